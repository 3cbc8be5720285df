"""What goes first when the store is full. Pure arithmetic.

A segment is worth the computing that it saves for each byte that it takes, times the chance that it is wanted, which falls
with the time since it last was: value / (age + an hour). Age is a factor and not a tie-breaker, as values per byte of
conversations with one model are all within a few times of each other and never equal: old long conversations would stay for
ever, and every new one would go. What saved sessions refer to goes last, and no segment before those that are built on it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

EVEN_POSITION: Final = 32768
"""Where attention costs a token as much as the matrices: for 8B parameters in 32 layers of 4096, 2 * 8e9 = 4 * 32 * 4096 * n
at n = 30,000; larger models lie higher, in proportion to their width."""
GRACE_S: Final = 3600.0  # within which the order of use says little


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A segment on disk. `parent` and `id` are unique in all folders; a parent may be gone."""

    id: str
    parent: str
    start: int
    num_rows: int
    nbytes: int
    used_at: float

    def score(self, now: float) -> float:
        """Tokens' worth of computing that a byte saves, weighed by age."""
        mean = self.start + self.num_rows / 2
        saved = self.num_rows * (1 + mean / EVEN_POSITION)
        return saved / max(1, self.nbytes) / (max(0.0, now - self.used_at) + GRACE_S)


def order(stored: Collection[Stored], referred: AbstractSet[str], now: float) -> list[Stored]:
    """All of them, in the order in which they go."""
    by_id: Mapping[str, Stored] = {segment.id: segment for segment in stored}
    children = Counter(segment.parent for segment in stored if segment.parent in by_id)
    ready = [(*_rank(segment, referred, now), segment.id) for segment in stored if not children[segment.id]]
    heapq.heapify(ready)
    result = []
    while ready:
        segment = by_id[heapq.heappop(ready)[-1]]
        result.append(segment)
        parent = by_id.get(segment.parent)
        if parent is not None:
            children[parent.id] -= 1
            if not children[parent.id]:
                heapq.heappush(ready, (*_rank(parent, referred, now), parent.id))
    gone = {segment.id for segment in result}
    return [segment for segment in stored if segment.id not in gone] + result  # records that name each other are lies


def _rank(segment: Stored, referred: AbstractSet[str], now: float) -> tuple[bool, float]:
    return segment.id in referred, segment.score(now)
