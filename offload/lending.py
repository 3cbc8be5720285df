"""Memory that is set aside for the KV cache and for prompts, holding weights until it is needed.

The plan says what fits at a given fill of the cache. Here it is decided when memory changes hands; who borrows it, blocks or
slots for experts, is in `borrowers`. What is computed never depends on it. Driver thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from offload.config import FEW_TOKENS
from offload.tiers.base import CancelToken
from offload.tiers.heap import trim_heap
from offload.tiers.ram import Slab


class Range(NamedTuple):
    """Bytes `[offset, offset + nbytes)` of a slab."""

    offset: int
    nbytes: int


class CacheMemory:
    """The pages under the KV cache, of which only those in use are resident.

    Args:
        ranges: `ranges(first, last)` gives the parts of `slab` that belong to buckets `[first, last)`.
        bucket_tokens: positions of a bucket.
    """

    def __init__(self, slab: Slab, ranges: Callable[[int, int], Sequence[Range]], bucket_tokens: int) -> None:
        self._slab = slab
        self._ranges = ranges
        self._bucket_tokens = bucket_tokens
        self._used = 0

    def buckets(self, tokens: int) -> int:
        """Buckets that hold `tokens` positions."""
        return max(1, -(-tokens // self._bucket_tokens))

    def resize(self, tokens: int) -> None:
        """Makes room for `tokens` positions, and gives back what lies behind them.

        Raises:
            AllocationError: the system has no memory.
        """
        wanted = self.buckets(tokens)
        if wanted > self._used:
            for part in self._ranges(self._used, wanted):
                self._slab.populate(part.offset, part.nbytes)
        elif wanted < self._used:
            for part in self._ranges(wanted, self._used):
                self._slab.discard(part.offset, part.nbytes)
        self._used = wanted


class IdleMemory(NamedTuple):
    """What a backend can lend: the cache behind what is used, and, once `release_prompt` was called, what prompts use."""

    cache: CacheMemory
    release_prompt: Callable[[], None]


class _Use(NamedTuple):
    """What cannot be lent: so many buckets of the cache, and a prompt's workspace."""

    buckets: int
    prompt: bool


class Borrower(Protocol):
    """Holds weights in memory that is lent to it. Positions are those of the cache that are in use."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights that are on loan now."""
        ...

    def give_back(self, positions: int, *, prompt: bool) -> None:
        """Leaves what cannot be lent at so many positions, while a prompt is read or not. Takes nothing."""
        ...

    def take(self, positions: int, cancel: CancelToken | None) -> bool:
        """Takes all that can be lent while tokens are decoded; whether that meant to wait.

        Raises:
            StorageError: a block could not be read. Cancelled: it was not waited for. AllocationError: no memory.
        """
        ...


class Lending:
    """See the module."""

    def __init__(self, idle: IdleMemory, borrower: Borrower) -> None:
        self._cache = idle.cache
        self._release_prompt = idle.release_prompt
        self._borrower = borrower
        self._use: _Use | None = None
        self._is_settled = False
        self._prompt_held = True  # planning built a prompt's graphs

    @property
    def nbytes(self) -> int:
        """Bytes of weights that are on loan now."""
        return self._borrower.nbytes

    def make_room(self, positions: int, pass_tokens: int) -> None:
        """Takes back what passes of up to `pass_tokens` tokens need that fill the cache up to `positions`. Lends nothing.

        Raises:
            AllocationError: the system has no memory.
        """
        use = _Use(self._cache.buckets(positions), pass_tokens > FEW_TOKENS)
        if use == self._use:
            return
        self._use, self._is_settled = None, False
        self._prompt_held |= use.prompt
        self._borrower.give_back(positions, prompt=use.prompt)
        self._cache.resize(positions)
        self._use = use

    def lend(self, positions: int, cancel: CancelToken | None = None) -> bool:
        """Before passes of a few tokens that fill the cache up to `positions`: lends all that is idle.

        Returns whether that meant to wait for blocks. Raises: see `Borrower.take`.
        """
        self.make_room(positions, 1)
        if self._is_settled:
            return False
        if self._prompt_held:
            self._release_prompt()
            trim_heap()
            self._prompt_held = False
        waited = self._borrower.take(positions, cancel)
        self._is_settled = True
        return waited
