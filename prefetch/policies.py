"""The policies by the names that people use. Which one a model gets is decided by a replay of its trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from offload.errors import UsageError
from offload.prefetch.eviction import (
    Eviction,
    HitDensity,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    OneBit,
    RecencyFrequency,
    Regret,
)

MakeEviction = Callable[[Sequence[int], int], Eviction]
"""`make(layers, num_experts)`."""

EVICTION: Final[Mapping[str, MakeEviction]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "lrfu-4": partial(RecencyFrequency, half_life=4.0),
    "lrfu-16": partial(RecencyFrequency, half_life=16.0),
    "lrfu-64": partial(RecencyFrequency, half_life=64.0),
    "shallow": partial(RecencyFrequency, half_life=16.0, shallow=1.0),
    "density": HitDensity,
    "one-bit": OneBit,
    "regret": Regret,
}

DEFAULT_EVICTION: Final = "lrfu-64"


def make_eviction(name: str, layers: Sequence[int], num_experts: int) -> Eviction:
    """The policy of that name; "auto" is the default.

    Raises:
        UsageError: there is none.
    """
    chosen = EVICTION.get(DEFAULT_EVICTION if name == "auto" else name)
    if chosen is None:
        raise UsageError(f"expert policy {name!r}: choose auto, {', '.join(EVICTION)}")
    return chosen(layers, num_experts)
