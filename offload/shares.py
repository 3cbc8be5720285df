"""What one tier keeps of some blocks, and what passes through its ring instead: candidates for a plan. Pure arithmetic.

A candidate streams blocks in one of the orders of `streaming_order` until the others and a ring fit. Where a block is a
large part of the tier, the last ones matter: `leanest` chooses those around the end of each candidate exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

from offload.demand import Demand
from offload.prefetch.sequential import block_limits, ring_capacity, streaming_order

RING_SLACKS: Final = (4.0, 2.0, 1.0, 0.5, 0.25, 0.0)
CORE_BLOCKS: Final = 8  # 256 choices: a quarter of a millisecond


class Share(NamedTuple):
    """One tier's part: its pinned blocks, those that pass through its ring, first chosen first, and the ring's bytes."""

    pinned: frozenset[int]
    streamed: tuple[int, ...]
    ring: int


NOTHING: Final = Share(frozenset(), (), 0)


def roomiest(demand: Demand, available: int, members: frozenset[int]) -> list[Share]:
    """Candidates with large rings first; a roomier ring hides latency, a smaller one pins more. None when nothing fits."""
    orders = _orders(demand)
    shares = [_choose(demand, available, slack, members, order) for slack in RING_SLACKS for order in orders]
    return [share for share in shares if share is not None]


def leanest(demand: Demand, available: int, members: frozenset[int]) -> list[Share]:
    """Candidates with the smallest rings that work, one for each order, none of which could stream a little less."""
    shares = []
    for order in _orders(demand):
        share = _choose(demand, available, 0.0, members, order)
        if share is not None:
            shares.append(_tightened(demand, available, [i for i in order if i in members], share))
    return shares


def ring_bytes(demand: Demand, streamed: Collection[int], slack: float) -> int:
    """What `ring_capacity` says of these blocks."""
    members = frozenset(streamed)
    needs = [[demand.blocks[i].footprint for i in group if i in members] for group in demand.groups]
    return ring_capacity(needs, slack)


def nbytes(demand: Demand, indices: Iterable[int]) -> int:
    """Memory of these blocks."""
    return sum(demand.blocks[i].footprint for i in indices)


def _orders(demand: Demand) -> list[list[int]]:
    return [streaming_order(demand.blocks, limit) for limit in reversed(block_limits(demand.blocks))]


def _choose(
    demand: Demand, available: int, slack: float, members: frozenset[int], order: Sequence[int]
) -> Share | None:
    """Streams as few of `members`, in this order, as the slack allows, or None when they do not fit."""
    pinned = nbytes(demand, members)
    if pinned <= available:
        return Share(members, (), 0)
    streamed: list[int] = []
    for index in order:
        if index not in members:
            continue
        streamed.append(index)
        pinned -= demand.blocks[index].footprint
        if pinned > available:
            continue
        ring = ring_bytes(demand, streamed, slack)
        if pinned + ring <= available:
            return Share(members.difference(streamed), tuple(streamed), ring)
    return None


def _tightened(demand: Demand, available: int, order: Sequence[int], share: Share) -> Share:
    """The same, where of the blocks around the end of `streamed` (a knapsack's core) those are streamed that are the fewest
    bytes; of equal sums the one of the most blocks, since small ones pass through a small ring below."""
    if not share.streamed:
        return share
    end = min(len(share.streamed) + CORE_BLOCKS // 2, len(order))
    core = order[max(0, end - CORE_BLOCKS) : end]
    others = frozenset(share.streamed).difference(core)
    kept = nbytes(demand, share.pinned.difference(core))
    everything = kept + nbytes(demand, core)
    found = (nbytes(demand, set(core).intersection(share.streamed)), 0, share)
    for number, size, ring in _subsets(demand, core, others):
        if everything - size + ring <= available and (size, -number.bit_count()) < found[:2]:
            chosen = {index for place, index in enumerate(core) if number >> place & 1}
            streamed = tuple(index for index in order if index in others or index in chosen)
            pinned = (share.pinned | frozenset(share.streamed)).difference(streamed)
            found = (size, -len(chosen), Share(pinned, streamed, ring_bytes(demand, streamed, 0.0)))
    return found[2]


def _subsets(demand: Demand, core: Sequence[int], others: frozenset[int]) -> list[tuple[int, int, int]]:
    """All subsets of `core` as bit sets, their bytes, and the least ring through which they and `others` pass.

    Each is its lowest block and a smaller subset, so that its sums take one step.
    """
    footprints = [demand.blocks[index].footprint for index in core]
    group_of = {index: number for number, group in enumerate(demand.groups) for index in group}
    streamed = [0] * len(demand.groups)
    for index in others:
        streamed[group_of[index]] += demand.blocks[index].footprint
    mates = [sum(1 << k for k, j in enumerate(core) if group_of[i] == group_of[j]) for i in core]
    sizes = [0]
    groups, blocks = [max(streamed)], [max((demand.blocks[i].footprint for i in others), default=0)]
    for number in range(1, 1 << len(core)):
        rest = number & (number - 1)
        lowest = (number ^ rest).bit_length() - 1
        sizes.append(sizes[rest] + footprints[lowest])
        blocks.append(max(blocks[rest], footprints[lowest]))
        in_group = streamed[group_of[core[lowest]]] + sizes[number & mates[lowest]]
        groups.append(max(groups[rest], in_group))
    return [(number, sizes[number], groups[number] + blocks[number]) for number in range(1 << len(core))]
