from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from offload.blocks import BlockKey, BlockSpec
from offload.errors import WouldBlock
from offload.prefetch.sequential import ring_capacity, spread, streaming_order
from offload.tiers.ring import RingAllocator


def block(layer: int, name: str, nbytes: int, columns: int = 0) -> BlockSpec:
    return BlockSpec(key=BlockKey("weight", layer, f"blk.{layer}.{name}"), nbytes=nbytes, columns=columns)


@given(st.integers(0, 200))
def test_spread_is_a_permutation(count: int) -> None:
    assert sorted(spread(count)) == list(range(count))


@given(st.integers(8, 200), st.data())
def test_every_prefix_of_spread_leaves_no_long_gap(count: int, data: st.DataObject) -> None:
    taken = data.draw(st.integers(2, count))
    chosen = sorted(spread(count)[:taken])
    gaps = [b - a for a, b in pairwise(chosen)] + [chosen[0] + count - chosen[-1]]
    # three-distance theorem: the longest gap of a golden-ratio sequence is below 1 + phi times the mean, plus rounding
    assert max(gaps) <= 2.7 * count / taken + 2


def test_the_role_with_the_most_bytes_is_streamed_first_and_whole_before_the_next() -> None:
    blocks = [block(layer, name, size) for layer in range(4) for name, size in (("q", 10), ("down", 100), ("up", 60))]
    order = [blocks[i].key.name.split(".")[-1] for i in streaming_order(blocks)]
    assert order == ["down"] * 4 + ["up"] * 4 + ["q"] * 4


def test_roles_with_long_rows_are_streamed_last() -> None:
    shapes = (("q", 10, 8), ("down", 100, 32), ("up", 60, 8))
    blocks = [block(layer, *shape) for layer in range(4) for shape in shapes]
    order = [blocks[i].key.name.split(".")[-1] for i in streaming_order(blocks)]
    assert order == ["up"] * 4 + ["q"] * 4 + ["down"] * 4


@given(st.lists(st.lists(st.integers(1, 40), max_size=4), min_size=1, max_size=8), st.floats(0, 2))
def test_no_ring_deadlocks(stages: list[list[int]], slack: float) -> None:
    """Walks three passes: fill as far as there is room, then take a whole stage, then release it."""
    needs = [[4096 * size for size in stage] for stage in stages]
    cycle = [size for stage in needs for size in stage]
    if not cycle:
        return
    ring = RingAllocator(ring_capacity(needs, slack))
    started: list[int] = []
    position = 0

    def fill() -> None:
        nonlocal position
        while len(started) < len(cycle):
            try:
                started.append(ring.try_allocate(cycle[position % len(cycle)]).number)
            except WouldBlock:
                return
            position += 1

    for _ in range(3):
        for stage in needs:
            fill()
            assert len(started) >= len(stage), "the stage's blocks can never all be in the ring"
            for _ in stage:
                ring.release(started.pop(0))
