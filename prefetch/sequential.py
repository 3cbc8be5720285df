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

    Matrices of one role (same name in every layer) are taken together: the role with the shortest rows first, since what
    is multiplied with a matrix in parts is brought into the kernel's type anew for each part; of those the one with the
    most bytes. Within a role they come in the golden-ratio order of their layers: every prefix of that sequence is spread
    almost evenly (Weyl's low-discrepancy sequence), so a partly streamed role loads the disk evenly over the pass. The
    parts of a matrix follow each other from the last to the first: what stays of one is its head, and what borrows is
    ascending.
    """
    roles: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, block in enumerate(blocks):
        roles[_role(block)][block.key.name].append(index)
    members = {role: [blocks[i] for found in named.values() for i in found] for role, named in roles.items()}
    order: list[int] = []
    for role in sorted(roles, key=lambda role: _preference(role, members[role])):
        if limit is None or max(block.footprint for block in members[role]) <= limit:
            matrices = list(roles[role].values())
            order += [index for place in spread(len(matrices)) for index in reversed(matrices[place])]
    return order


def _preference(role: str, blocks: Sequence[BlockSpec]) -> tuple[int, int, str]:
    return max(block.columns for block in blocks), -sum(block.nbytes for block in blocks), role


def spread(count: int) -> list[int]:
    """A permutation of `range(count)` whose every prefix is spread almost evenly over the range."""
    by_angle = sorted(range(count), key=lambda i: (i + 1) * GOLDEN % 1)
    rank = [0] * count
    for place, index in enumerate(by_angle):
        rank[index] = place
    return rank


def ring_capacity(group_needs: Sequence[Sequence[int]], slack: float) -> int:
    """Bytes of a circular buffer, whole pages, through which the streamed blocks of all groups can pass.

    Args:
        group_needs: footprints of the streamed blocks that have to be there together.
        slack: 0 gives the smallest ring that can never deadlock, 1 lets a whole further group be read ahead.

    While a group waits, only its own blocks are live, and the jump over the buffer's end wastes less than one block:
    the largest group plus the largest block always suffices.
    """
    largest_group = max((sum(needs) for needs in group_needs), default=0)
    largest_block = max((need for needs in group_needs for need in needs), default=0)
    return largest_group + align_down(int(largest_group * slack)) + largest_block


def _role(block: BlockSpec) -> str:
    """`blk.7.ffn_down.weight` -> `ffn_down.weight`; parts of the head share one role."""
    name = block.key.name
    if block.key.layer >= 0:
        name = name.split(".", 2)[-1]
    return name.split("[", 1)[0]
