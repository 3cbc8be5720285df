"""What a place for a model is: a backend whose pinned matrices are in it, and the residency that brings it the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from offload.expert_cache import ExpertCache
from offload.expert_slots import ExpertBank
from offload.kernels.batch import Backend, Floats, Foresight
from offload.lending import IdleMemory
from offload.opening import Footprint
from offload.plan import Plan
from offload.residency import Residency
from offload.results import EdgeUse
from offload.sharing import Sharing
from offload.telemetry import Telemetry
from offload.tiers.nvme import NvmeReader

Report = Callable[[int, int], None]


class Place(Protocol):
    """One way to hold a model. Made before the plan (`footprint`), filled after it (`fill`)."""

    def footprint(self) -> Footprint: ...

    def spill(self, nbytes: int = 0) -> bool:
        """Has the KV cache take no more memory than this, or as little as it can; False where it takes all it ever does."""
        ...

    @property
    def kv_traffic(self) -> Mapping[str, EdgeUse]:
        """What of the cache was read from disk and written there, by edge; nothing where it is all in memory."""
        ...

    def fill(self, plan: Plan, reader: NvmeReader, telemetry: Telemetry, report: Report | None) -> Residency:
        """Allocates and reads what is pinned; whatever it makes is freed with the stack it was given."""
        ...

    def place_vector(self, name: str, values: Floats) -> None: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def idle(self) -> IdleMemory | None:
        """What can be lent to weights, after `fill`; None where nothing can."""
        ...

    @property
    def experts(self) -> ExpertCache | None:
        """What brings experts, after `fill`; None where there are none, or all are resident."""
        ...

    @property
    def sharing(self) -> Sharing | None:
        """Whether the host computes beside a device, after `fill`; None where there is no device, or it does not."""
        ...

    @property
    def banks(self) -> Sequence[ExpertBank]:
        """What it brings them into, in the plan's order."""
        ...

    @property
    def foresight(self) -> Foresight:
        """What passes guess for it, after `fill`."""
        ...
