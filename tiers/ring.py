"""Space for blocks that pass through: regions of a fixed capacity, handed out in circular order.

    free space, no wrap:   [ free | tail ..live.. head | free ]
    free space, wrapped:   [ ..live.. head | free | tail ..live.. | waste ]

A region is contiguous; one that does not fit before the end starts at 0, and the rest of the lap is wasted. Regions may be
released in any order; their space comes back in the order in which it was handed out. Holds numbers only, no memory.

Threads: none; the driver thread is its only user.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from offload.errors import WouldBlock
from offload.units import PAGE, align_up


class Region(NamedTuple):
    """`[offset, offset + nbytes)` of the ring. `number` is on a timeline: it is never used twice, not even after `reset`."""

    offset: int
    nbytes: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RingStatistics:
    """What a ring holds now, and what it has done since it was made.

    Attributes:
        used_bytes: in regions whose space has not come back yet.
        regions: how many those are.
        allocations: regions handed out. refusals: calls that raised WouldBlock. laps: returns to offset 0.
    """

    capacity_bytes: int
    used_bytes: int
    regions: int
    allocations: int
    refusals: int
    laps: int


class RingAllocator:
    """Hands out regions of `[0, capacity)`. Offsets and sizes are multiples of `PAGE`; so must `capacity` be."""

    def __init__(self, capacity: int) -> None:
        assert capacity > 0 and capacity % PAGE == 0, capacity
        self.capacity = capacity
        self._live: deque[Region] = deque()
        self._released: set[int] = set()
        self._head = 0
        self._next_number = 0
        self._used = 0
        self._refusals = 0
        self._laps = 0

    def try_allocate(self, nbytes: int) -> Region:
        """The next region, of `nbytes` rounded up to whole pages. Always succeeds when nothing is live.

        Raises:
            WouldBlock: no room until the oldest region is released.
        """
        assert 0 < nbytes <= self.capacity, (nbytes, self.capacity)
        nbytes = align_up(nbytes)
        offset = self._find(nbytes)
        if offset is None:
            self._refusals += 1
            raise WouldBlock(f"ring: no room for {nbytes} of {self.capacity} bytes, {self._used} in use")
        self._laps += offset == 0 and self._next_number > 0
        region = Region(offset, nbytes, self._next_number)
        self._next_number += 1
        self._head = offset + nbytes
        self._used += nbytes
        self._live.append(region)
        return region

    def release(self, number: int) -> None:
        """The region is no longer needed. Space comes back once all older regions are released too."""
        assert self._live and self._live[0].number <= number < self._next_number, f"region {number} is not live"
        assert number not in self._released, f"region {number} was released before"
        self._released.add(number)
        while self._live and self._live[0].number in self._released:
            region = self._live.popleft()
            self._released.remove(region.number)
            self._used -= region.nbytes

    def reset(self) -> None:
        """Forgets all regions. Nobody may still read or write them."""
        self._live.clear()
        self._released.clear()
        self._head = self._used = 0

    def statistics(self) -> RingStatistics:
        return RingStatistics(
            capacity_bytes=self.capacity,
            used_bytes=self._used,
            regions=len(self._live),
            allocations=self._next_number,
            refusals=self._refusals,
            laps=self._laps,
        )

    def _find(self, nbytes: int) -> int | None:
        if not self._live:
            return 0
        tail, head = self._live[0].offset, self._head
        if head <= tail:
            return head if head + nbytes <= tail else None
        if head + nbytes <= self.capacity:
            return head
        return 0 if nbytes <= tail else None
