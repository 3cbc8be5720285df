"""Where every block will live, and how fast that will be. How it is found out is `planning`'s. Pure arithmetic, no I/O.

    budget = base + margin + vectors + KV + workspace + ring + pinned        (host RAM)

Blocks that are not pinned are streamed from disk once per pass through the ring. With a device there is one tier more, of
the same form: what is not pinned in VRAM passes through a ring there, and only that needs a place in RAM or on disk.

The KV cache is empty at first, and a prompt's workspace is idle while tokens are decoded: until they are used, such bytes
hold streamed blocks, on loan. The plan counts them where they belong; a loan makes tokens faster and takes no more memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from offload.bank_plan import beside, share_slots
from offload.blocks import BlockKey, BlockSpec, TierName
from offload.demand import Demand
from offload.units import MIB, align_down

DEFAULT_DISK_BPS: Final = 1.0e9
OVERLAP_COST: Final = 0.15
"""What computing and reading take from each other while both run: memory bandwidth, and a core now and then. Measured on two
cores with a disk of 3.3 GB/s: kernels kept 0.82 to 0.86 of their speed, reads 0.83 to 0.95 of theirs."""
EXPERT_OVERLAP_COST: Final = 0.5
"""The same where experts are read: which ones is known late, so half of the shorter one is not overlapped. Measured with 94%
of guesses right, at a third and at two thirds of the experts in memory."""
LOAN_GRAIN: Final = 2 * MIB  # a huge page: less than one cannot be given back


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One block and the tier that is its home."""

    key: BlockKey
    tier: TierName
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A placement and what follows from it. Byte counts are of host RAM unless they say otherwise.

    Attributes:
        minimum_bytes: a budget that is sure to do.
        pinned_bytes: weights that stay for good. streamed_bytes: the others, read once per pass when nothing is lent.
        borrowers: streamed blocks that may live in idle memory, in the order in which they get it.
        link_bytes: that cross to the device for a decoded token. shared_bytes: that the host computes instead, where they
            lie; `host_share` of each matrix in its memory.
        bank_slots: for each bank, how many experts it holds. bank_bytes: memory of all banks.
        device_slots: experts of a bank that the device holds. device_visiting: slots for others. device_bank_bytes: of both.
    """

    budget_bytes: int
    minimum_bytes: int
    model_bytes: int
    pinned_bytes: int
    streamed_bytes: int
    ring_bytes: int
    kv_bytes: int
    workspace_bytes: int
    base_bytes: int
    margin_bytes: int
    embedding_bytes: int
    edges: Mapping[str, float]
    compute_s: float
    placements: tuple[Placement, ...]
    borrowers: tuple[BlockSpec, ...]
    bank_slots: tuple[int, ...] = ()
    bank_bytes: int = 0
    device_slots: tuple[int, ...] = ()
    device_visiting: int = 0
    device_bank_bytes: int = 0
    ctx: int
    trained_ctx: int
    prefill_tokens_per_pass: int
    device_budget_bytes: int | None = None
    device_pinned_bytes: int = 0
    device_ring_bytes: int = 0
    link_bytes: int = 0
    shared_bytes: int = 0
    host_share: float = 0.0
    demand: Demand = field(repr=False)

    @property
    def predicted_tps(self) -> float:
        """Decoded tokens per second at the start of the context."""
        return self.predicted_tps_at(0)

    def predicted_tps_at(self, position: int) -> float:
        """Decoded tokens per second behind `position` tokens."""
        return 1 / max(self.seconds_at(position), 1e-9)

    def seconds_at(self, position: int) -> float:
        """Seconds that a token behind `position` others takes.

        Computing and reading overlap, so the longer of the two decides, and the shorter slows it a little; attention's
        share of computing grows with the position (a sliding window's, which stops growing, counts as if it grew evenly).
        """
        compute_s = self.compute_s + self.demand.attention_s * min(1.0, position / self.ctx)
        stream_s, overlap_cost = self.stream_s_at(position), OVERLAP_COST
        if self.missed_bytes_at(position):
            compute_s += self.demand.fetch_s
            overlap_cost = EXPERT_OVERLAP_COST
        return overlapped_s(compute_s, stream_s, overlap_cost)

    def on_loan(self, tokens: int, *, prompt: bool = False) -> int:
        """How many of `borrowers` fit into what is idle, see `Demand.idle`."""
        idle = align_down(self.demand.idle(tokens, prompt=prompt), LOAN_GRAIN)
        count = 0
        for block in self.borrowers:
            idle -= block.footprint
            if idle < 0:
                break
            count += 1
        return count

    def bank_slots_at(self, tokens: int, *, prompt: bool = False) -> tuple[int, ...]:
        """For each bank, how many experts it holds when idle memory is lent to it, see `Demand.idle`.

        Blocks that every token streams come first: where there are any, experts get nothing.
        """
        if self.borrowers or not self.bank_slots:
            return self.bank_slots
        grain = LOAN_GRAIN * len(self.bank_slots)  # each bank may keep a huge page that it shares with a slot that went
        idle = self.demand.idle(tokens, prompt=prompt) - grain
        slots = share_slots(self.demand.banks, self.bank_bytes + max(0, idle))
        return beside(self.demand.banks, tuple(map(max, self.bank_slots, slots)), self.device_slots)

    def streamed_bytes_at(self, position: int) -> int:
        """Bytes read from disk for one decoded token behind `position` others."""
        lent = sum(block.footprint for block in self.borrowers[: self.on_loan(position + 1)])
        cached = int(self.demand.kv_streamed_bytes * min(1.0, position / self.ctx))
        return self.streamed_bytes - lent + self.missed_bytes_at(position) + cached

    @property
    def expert_share(self) -> float:
        """Of all experts, what memory and the device hold; 1 where there are none."""
        every = sum(bank.num_experts for bank in self.demand.banks)
        held = sum(self.bank_slots) + sum(self.device_slots)
        return min(1.0, held / every) if every else 1.0

    @property
    def host_kv(self) -> frozenset[int]:
        """Layers whose keys and values lie in host memory beside a device."""
        return self.demand.host_kv

    @property
    def device_kv_bytes(self) -> int:
        """Of the KV cache, what is on the device; `kv_bytes` are in host memory."""
        return 0 if self.demand.device_fixed is None else self.demand.device_fixed["kv"]

    @property
    def bank_bytes_held(self) -> int:
        """Bytes of the experts that memory holds: of `bank_bytes`, what is weights."""
        return sum(slots * bank.expert_bytes for bank, slots in zip(self.demand.banks, self.bank_slots, strict=True))

    @property
    def bank_bytes_on_disk(self) -> int:
        """Bytes of the experts that memory does not hold."""
        every = sum(bank.num_experts * bank.expert_bytes for bank in self.demand.banks)
        return max(0, every - self.bank_bytes_held - self.device_bank_bytes_held)

    @property
    def device_bank_bytes_held(self) -> int:
        """Bytes of the experts that the device holds: of `device_bank_bytes`, what is weights."""
        return sum(slots * bank.expert_bytes for bank, slots in zip(self.demand.banks, self.device_slots, strict=False))

    @property
    def missed_bytes(self) -> int:
        """`missed_bytes_at` the start of the context."""
        return self.missed_bytes_at(0)

    def missed_bytes_at(self, position: int) -> int:
        """Bytes of experts read for such a token: as in the trace, or as if all were chosen equally often."""
        slots = self.bank_slots_at(position + 1)
        held = self.device_slots or (0,) * len(slots)
        return sum(
            bank.missed_bytes(min(bank.num_experts, here + there))
            for bank, here, there in zip(self.demand.banks, slots, held, strict=True)
        )

    @property
    def lends(self) -> bool:
        """Whether anything borrows what is idle."""
        return self.on_loan(0) > 0 or self.bank_slots_at(0) != self.bank_slots

    def stream_s_at(self, position: int) -> float:
        """Seconds that moving the weights of such a token takes, over the slowest edge."""
        host_s = self.shared_bytes / self.demand.dense_bps if self.shared_bytes else 0.0
        return max(moving_s(self.demand, self.link_bytes, self.streamed_bytes_at(position)), host_s)

    @property
    def stream_s(self) -> float:
        """`stream_s_at` the start of the context."""
        return self.stream_s_at(0)

    @property
    def bound(self) -> Literal["disk", "link", "compute"]:
        """What limits decoding."""
        if self.compute_s >= self.stream_s:
            return "compute"
        return "disk" if self.streamed_bytes_at(0) / self.demand.disk_bps >= self.stream_s else "link"

    @property
    def used_bytes(self) -> int:
        """Bytes of the budget that the plan gives out."""
        return (
            self.base_bytes + self.margin_bytes + self.kv_bytes + self.workspace_bytes
            + self.ring_bytes + self.pinned_bytes + self.embedding_bytes + self.bank_bytes
        )  # fmt: skip

    @property
    def streamed(self) -> frozenset[BlockKey]:
        """Keys of the blocks that a pass has to wait for: all that are not pinned where computing happens."""
        home = "ram" if self.device_budget_bytes is None else "vram"
        return frozenset(placement.key for placement in self.placements if placement.tier != home)

    @property
    def from_disk(self) -> frozenset[BlockKey]:
        """Keys of the blocks that are read from disk in every pass."""
        return frozenset(placement.key for placement in self.placements if placement.tier == "nvme")


def overlapped_s(compute_s: float, stream_s: float, overlap_cost: float = OVERLAP_COST) -> float:
    """Seconds of a token: the longer of the two, which the shorter slows a little."""
    return max(compute_s, stream_s) + overlap_cost * min(compute_s, stream_s)


def moving_s(demand: Demand, link_bytes: float, disk_bytes: int) -> float:
    """Seconds over the slowest edge."""
    return max(disk_bytes / demand.disk_bps, link_bytes / demand.link_bps if link_bytes else 0.0)
