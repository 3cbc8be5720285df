"""Memory that is set aside for the KV cache and for prompts, holding weights until it is needed.

The plan says which blocks borrow, in which order, and how many fit at a given fill of the cache. Here the border is moved:
a block that has to leave is streamed again from the next pass on, one that gets memory is read once and stays. What is
computed never depends on it. Driver thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from offload.blocks import BlockKey
from offload.config import FEW_TOKENS
from offload.plan import Plan
from offload.residency import Residency
from offload.tiers.base import CancelToken, Reader
from offload.tiers.heap import trim_heap
from offload.tiers.ram import HUGE_PAGE, Slab
from offload.units import align_up


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


class Lending:
    """See the module.

    Args:
        slab: memory for the borrowers, not resident yet.
        moved: told the keys of the blocks that are streamed from now on.
    """

    def __init__(
        self, plan: Plan, idle: IdleMemory, slab: Slab, residency: Residency, reader: Reader,
        moved: Callable[[frozenset[BlockKey]], None],
    ) -> None:  # fmt: skip
        self._plan = plan
        self._cache = idle.cache
        self._release_prompt = idle.release_prompt
        self._slab = slab
        self._residency = residency
        self._reader = reader
        self._moved = moved
        self._count = 0
        self._use: _Use | None = None
        self._is_settled = False
        self._prompt_held = True  # planning built a prompt's graphs

    @property
    def nbytes(self) -> int:
        """Bytes of weights that are on loan now."""
        return self._end(self._count)

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
        allowed = self._plan.on_loan(positions, prompt=use.prompt)
        if allowed < self._count:
            self._take_back(allowed)
        self._cache.resize(positions)
        self._use = use

    def lend(self, positions: int, cancel: CancelToken | None = None) -> bool:
        """Before passes of a few tokens that fill the cache up to `positions`: lends all that is idle.

        Returns whether that meant to wait for blocks.

        Raises:
            StorageError: a block could not be read. Cancelled: it was not waited for. AllocationError: no memory.
        """
        self.make_room(positions, 1)
        if self._is_settled:
            return False
        if self._prompt_held:
            self._release_prompt()
            trim_heap()
            self._prompt_held = False
        allowed = self._plan.on_loan(positions)
        waits = allowed > self._count
        if waits:
            self._pin(allowed, cancel)
        self._is_settled = True
        return waits

    def _take_back(self, count: int) -> None:
        self._residency.unpin(self._plan.borrowers[count : self._count])
        self._stream_all_but(count)
        self._count = count
        self._discard()

    def _pin(self, count: int, cancel: CancelToken | None) -> None:
        blocks, start = self._plan.borrowers[self._count : count], self._end(self._count)
        self._stream_all_but(count)
        try:
            self._slab.populate(start, self._end(count) - start)
            self._residency.pin(blocks, self._slab, self._reader, offset=start, cancel=cancel)
        except BaseException:
            self._reader.cancel_pending()
            self._reader.drain()  # nobody may write into the slab any more
            self._residency.unpin(blocks)
            self._stream_all_but(self._count)
            self._discard()
            raise
        self._count = count
        self._residency.read_ahead()

    def _stream_all_but(self, count: int) -> None:
        """The first `count` borrowers are not streamed, all others are."""
        keys = self._plan.streamed.difference(block.key for block in self._plan.borrowers[:count])
        self._residency.stream(keys)
        self._moved(keys)

    def _discard(self) -> None:
        """Gives back what lies behind the blocks that stay. A huge page that one of them shares stays with it."""
        kept = min(align_up(self._end(self._count), HUGE_PAGE), self._slab.nbytes)
        self._slab.discard(kept, self._slab.nbytes - kept)

    def _end(self, count: int) -> int:
        return sum(block.footprint for block in self._plan.borrowers[:count])
