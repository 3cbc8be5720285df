"""Which expert makes room for another: pure policies over names, without memory or I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Hashable
from typing import Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class Eviction(Protocol[K]):
    """Knows what is in a cache, and what was used when. Keys are added and removed by the cache, never by the policy."""

    def add(self, key: K, *, passing: bool = False) -> None:
        """The cache now holds `key`. `passing`: it was needed for a prompt, once, and is the first to go."""
        ...

    def use(self, key: K) -> None:
        """A token needed `key`, which the cache holds."""
        ...

    def remove(self, key: K) -> None:
        """The cache no longer holds `key`."""
        ...

    def victim(self, keep: Container[K]) -> K | None:
        """What should go next, if it is none of `keep`; None when all are."""
        ...


class LeastRecentlyUsed(Eviction[K]):
    """What was not used for longest goes first."""

    def __init__(self) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()

    def add(self, key: K, *, passing: bool = False) -> None:
        self._order[key] = None
        if passing:
            self._order.move_to_end(key, last=False)

    def use(self, key: K) -> None:
        self._order.move_to_end(key)

    def remove(self, key: K) -> None:
        del self._order[key]

    def victim(self, keep: Container[K]) -> K | None:
        return next((key for key in self._order if key not in keep), None)
