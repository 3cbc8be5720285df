"""Which layers keep keys and values in host memory, where the CPU attends to them, and what that costs. Pure arithmetic.

A layer there takes its bytes from the RAM budget instead of VRAM, which can hold weights then that would cross the link;
in exchange the CPU computes its attention (HeadInfer, arXiv 2502.12574, moves heads; here the unit is a layer).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from offload.prefetch.sequential import spread


@dataclass(frozen=True, slots=True, kw_only=True)
class KVDemand:
    """Keys and values that may lie on a device or in host memory, layer by layer.

    Attributes:
        layer_bytes: of a layer at the full context; all layers are alike.
        reaches: by layer, how many positions a token sees at the end of a full context.
        device_s, host_s: seconds that a token spends on a position of a layer, by where it lies.
        crossing_s: what the way to host memory and back adds to a token, for each layer there.
        device_bytes, host_bytes: what attention takes beside the cache on either side, where any layer lies there.
    """

    layer_bytes: int
    reaches: tuple[int, ...]
    device_s: float
    host_s: float
    crossing_s: float = 0.0
    device_bytes: int = 0
    host_bytes: int = 0

    @property
    def order(self) -> tuple[int, ...]:
        """All layers, first to go to host memory first: what costs least there. Of equals, those that are spread over the
        pass, so that weights cross the link meanwhile."""
        alike: dict[int, list[int]] = {}
        for layer, reach in enumerate(self.reaches):
            alike.setdefault(reach, []).append(layer)
        reaches = sorted(alike, key=lambda reach: (reach * (self.host_s - self.device_s), reach))
        return tuple(alike[reach][place] for reach in reaches for place in spread(len(alike[reach])))

    def attention_s(self, on_host: Collection[int]) -> float:
        """What attention adds to a token at the end of a full context."""
        return sum(
            reach * (self.host_s if layer in on_host else self.device_s) for layer, reach in enumerate(self.reaches)
        )
