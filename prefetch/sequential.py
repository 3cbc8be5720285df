"""Dense models: the order of use is known, so the only questions are what to leave on disk and how to spread it.

LRU is the worst choice on a cycle (every block is evicted just before its next use); keeping a fixed share and streaming the
rest moves the fewest bytes. What is streamed is spread evenly over the pass, so that reading goes on while pinned stages
compute. Pure arithmetic over block sizes; no memory, no I/O.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from offload.blocks import BlockSpec
from offload.units import align_down

GOLDEN: Final = 0.6180339887498949


def block_limits(blocks: Sequence[BlockSpec]) -> list[int]:
    """Largest footprints that a plan may want to stream, ascending: the size of each role's largest block."""
    largest: dict[str, int] = defaultdict(int)
    for block in blocks:
        largest[_role(block)] = max(largest[_role(block)], block.footprint)
    return sorted(set(largest.values()))


def streaming_order(blocks: Sequence[BlockSpec], limit: int | None = None) -> list[int]:
    """Indices of `blocks`, first to be streamed first.

    Args:
        limit: leaves out roles with a block whose footprint is larger. Small blocks need a small ring, which matters
            where nearly everything is pinned; large ones are fewer steps.

    Blocks of one role (same name in every layer) are taken together, the role with the most bytes first, and within a role
    in the golden-ratio order of their layers: every prefix of that sequence is spread almost evenly (Weyl's low-discrepancy
    sequence), so a partly streamed role loads the disk evenly over the pass.
    """
    roles: dict[str, list[int]] = defaultdict(list)
    for index, block in enumerate(blocks):
        roles[_role(block)].append(index)
    if limit is not None:
        roles = {role: found for role, found in roles.items() if max(blocks[i].footprint for i in found) <= limit}
    order: list[int] = []
    for _, members in sorted(roles.items(), key=lambda role: (-sum(blocks[i].nbytes for i in role[1]), role[0])):
        order += [members[place] for place in spread(len(members))]
    return order


def spread(count: int) -> list[int]:
    """A permutation of `range(count)` whose every prefix is spread almost evenly over the range."""
    by_angle = sorted(range(count), key=lambda i: (i + 1) * GOLDEN % 1)
    rank = [0] * count
    for place, index in enumerate(by_angle):
        rank[index] = place
    return rank


def ring_capacity(stage_needs: Sequence[Sequence[int]], slack: float) -> int:
    """Bytes of a circular buffer, whole pages, through which the streamed blocks of all stages can pass.

    Args:
        stage_needs: per stage, the footprints of its streamed blocks.
        slack: 0 gives the smallest ring that can never deadlock, 1 lets a whole further stage be read ahead.

    While a stage waits, only its own blocks are live, and the jump over the buffer's end wastes less than one block:
    the largest stage plus the largest block always suffices.
    """
    largest_stage = max((sum(needs) for needs in stage_needs), default=0)
    largest_block = max((need for needs in stage_needs for need in needs), default=0)
    return largest_stage + align_down(int(largest_stage * slack)) + largest_block


def _role(block: BlockSpec) -> str:
    """`blk.7.ffn_down.weight` -> `ffn_down.weight`; parts of the head share one role."""
    name = block.key.name
    if block.key.layer >= 0:
        name = name.split(".", 2)[-1]
    return name.split("[", 1)[0]
