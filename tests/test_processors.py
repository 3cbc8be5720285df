"""Work shared between two processors: within one piece of the best of all ways, and never slower than either alone."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.demand import BATCH_SPEEDUP
from offload.processors import ROW_GROUP, Processors, for_device, rows_on_device, share_of_host

Costs = list[tuple[float, float]]


def makespan(costs: Costs, device: frozenset[int]) -> float:
    """When both are done."""
    return max(
        sum(cost[0] for index, cost in enumerate(costs) if index in device),
        sum(cost[1] for index, cost in enumerate(costs) if index not in device),
    )


def best(costs: Costs) -> float:
    """Of all ways."""
    every = range(len(costs))
    subsets = chain.from_iterable(combinations(every, count) for count in range(len(costs) + 1))
    return min(makespan(costs, frozenset(subset)) for subset in subsets)


seconds = st.floats(0.01, 10)


@given(st.lists(st.tuples(seconds, seconds), max_size=8))
def test_the_split_is_within_a_piece_of_the_best_and_never_worse_than_one_alone(costs: Costs) -> None:
    found = makespan(costs, for_device(costs))
    piece = max((min(cost) for cost in costs), default=0.0)
    largest = max(map(max, costs), default=0.0)
    assert found <= best(costs) + max(piece, largest) + 1e-9
    assert found <= min(makespan(costs, frozenset()), makespan(costs, frozenset(range(len(costs))))) + 1e-9


@given(st.integers(0, 10), seconds, seconds)
def test_pieces_of_one_size_are_split_as_well_as_can_be(count: int, device_s: float, host_s: float) -> None:
    costs = [(device_s, host_s)] * count
    assert makespan(costs, for_device(costs)) == pytest.approx(best(costs))


@pytest.mark.parametrize(
    ("link_bps", "host_bps"),
    [(6e9, 30e9), (13e9, 25e9), (25e9, 40e9), (50e9, 60e9)],
    ids=["laptop", "pcie3", "pcie4", "pcie5"],
)
def test_many_small_pieces_end_at_the_same_time(link_bps: float, host_bps: float) -> None:
    """The fluid optimum: both speeds added."""
    processors = Processors(link_bps=link_bps, host_bps=host_bps)
    costs = [processors.costs(1_000_000, 1)] * 200
    assert makespan(costs, for_device(costs)) == pytest.approx(200e6 / (link_bps + host_bps), rel=0.05)


def test_a_batch_is_the_devices_business_and_a_single_token_both_ones() -> None:
    processors = Processors(link_bps=10e9, host_bps=20e9)
    few, many = processors.costs(10**7, 1), processors.costs(10**7, 40 * BATCH_SPEEDUP)
    assert few[0] == many[0] and many[1] == pytest.approx(40 * few[1])
    assert for_device([many] * 8) >= frozenset(range(7))
    assert 0 < len(for_device([few] * 8)) < 8
    assert for_device([few, many, few]) == {1}, "the one that many tokens chose crosses the link"


@given(
    st.integers(1, 60).map(lambda groups: groups * ROW_GROUP),
    st.floats(1e9, 60e9), st.floats(1e9, 60e9),
)  # fmt: skip
def test_rows_are_divided_as_well_as_whole_groups_allow(rows: int, link_bps: float, host_bps: float) -> None:
    def slower(first: int) -> float:
        return max(first / link_bps, (rows - first) / host_bps)

    first = rows_on_device(rows, share_of_host(link_bps, host_bps))
    best = min(slower(here) for here in range(ROW_GROUP, rows + 1, ROW_GROUP))
    assert 0 < first <= rows and (rows - first) % ROW_GROUP == 0
    assert slower(first) <= max(best + ROW_GROUP / 2 / min(link_bps, host_bps), 1.06 * best)


def test_a_slow_host_is_left_alone() -> None:
    assert share_of_host(50e9, 2e9) == 0.0 and rows_on_device(4096, 0.0) == 4096
    assert share_of_host(0.0, 20e9) == 0.0, "no link was measured"
