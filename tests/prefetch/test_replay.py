"""Replays against routings whose outcome is known, and the optimum against every policy and a brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.prefetch.locality import segment_cache_hit_rate, segment_routing_performance
from offload.prefetch.policies import EVICTION
from offload.prefetch.prediction import Affinity, Blend, Chance, Gate, Perfect, Popularity, Previous
from offload.prefetch.replay import Speeds, recall, replay
from offload.prefetch.routing import NOBODY, RoutingTrace, effective_experts
from offload.prefetch.synthetic import drifting, skewed, uniform


def trace_of(choices: object, **fields: object) -> RoutingTrace:
    array = np.array(choices, dtype=np.int16)
    tokens, layers, _ = array.shape
    known = {
        "layers": tuple(range(layers)), "num_experts": int(array.max()) + 1, "expert_bytes": (10,) * layers,
        "banks": (0,) * layers, "slot_bytes": (12,) * layers, "passes": np.arange(tokens, dtype=np.int32),
    }  # fmt: skip
    return RoutingTrace(**(known | {"choices": array} | fields))


def test_a_cycle_is_the_worst_for_recency_and_known_for_the_optimum() -> None:
    cycle = trace_of([[[token % 4]] for token in range(40)])
    assert replay(cycle, {0: 3}, EVICTION["lru"]).hits == 0
    best = replay(cycle, {0: 3}, None)
    assert best.hits == 24, "behind the first four, two of three uses hit: one of four is always away"
    assert (best.demands, best.nbytes) == (40, 16 * 10)


def brute_force(choices: list[int], slots: int) -> int:
    """The most hits that any way of evicting allows."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for expert in choices:
        following: dict[frozenset[int], int] = {}
        for state, hits in states.items():
            if expert in state:
                options, gained = [state], 1
            elif len(state) < slots:
                options, gained = [state | {expert}], 0
            else:
                options, gained = [frozenset(kept) | {expert} for kept in combinations(state, slots - 1)], 0
            for option in options:
                following[option] = max(following.get(option, 0), hits + gained)
        states = following
    return max(states.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 4))
def test_no_way_of_evicting_beats_the_optimum(experts: list[int], slots: int) -> None:
    trace = trace_of([[[expert]] for expert in experts], num_experts=6)
    best = brute_force(experts, slots)
    assert replay(trace, {0: slots}, None).hits == best
    for make in EVICTION.values():
        assert replay(trace, {0: slots}, make).hits <= best


@pytest.mark.parametrize("part", [0.25, 0.5])
def test_on_uniform_routing_no_policy_is_worth_more_than_its_share(part: float) -> None:
    trace = uniform(800, 4, 16, 2)
    for name, make in EVICTION.items():
        rate = replay(trace, trace.share(part), make, warm_up=100).hit_rate
        assert rate < part + 0.03, name


def test_on_skewed_routing_frequency_wins_and_on_drifting_routing_the_mix() -> None:
    def rates(trace: RoutingTrace) -> dict[str, float]:
        return {
            name: replay(trace, trace.share(0.25), make, warm_up=200).hit_rate for name, make in EVICTION.items()
        } | {"belady": replay(trace, trace.share(0.25), None, warm_up=200).hit_rate}

    still, moving = rates(skewed(1200, 4, 32, 4)), rates(drifting(1200, 4, 32, 4))
    assert still["lfu"] > still["lru"] + 0.1
    assert still["lrfu-64"] > still["lfu"] - 0.02
    assert moving["lrfu-16"] > max(moving["lfu"], moving["lru"]) + 0.05
    for found in (still, moving):
        assert found["belady"] > max(rate for name, rate in found.items() if name != "belady")


def test_perfect_information_hides_all_reading_that_fits_under_computing() -> None:
    trace = uniform(200, 4, 16, 2)
    speeds = Speeds(read_s=1.0, layer_s=2.0)
    plain = replay(trace, trace.share(0.5), EVICTION["lru"], speeds=speeds)
    ahead = replay(trace, trace.share(0.5), EVICTION["lru"], speeds=speeds, predictor=Perfect(4, 16), width=2)
    assert ahead.precision == 1.0
    first = sum(1 for _ in range(trace.num_tokens)) * 2  # nobody looks ahead of the first layer
    assert ahead.demands - ahead.hits <= first
    assert ahead.seconds < plain.seconds


def test_guesses_by_chance_cost_bytes_and_hits() -> None:
    trace = uniform(200, 4, 16, 2)
    plain = replay(trace, trace.share(0.5), EVICTION["lru"])
    ahead = replay(trace, trace.share(0.5), EVICTION["lru"], predictor=Chance(4, 16), width=2)
    assert ahead.precision < 0.3 and ahead.nbytes > plain.nbytes


def test_banks_are_apart() -> None:
    trace = trace_of([[[0], [0]], [[1], [1]]] * 10, banks=(0, 1))
    assert trace.rows_of_bank == {0: (0,), 1: (1,)}
    found = replay(trace, {0: 2, 1: 1}, EVICTION["lru"])
    assert found.hits == 18, "the first layer's two experts fit, the second's take turns"
    assert trace.slots(36) == {0: 1, 1: 1} and trace.slots(10**9) == {0: 2, 1: 2}


def test_tokens_that_did_not_reach_every_layer_are_left_out() -> None:
    choices = [[[0], [NOBODY]], [[1], [1]], [[1], [1]]]
    found = replay(trace_of(choices), {0: 4}, EVICTION["lru"])
    assert (found.tokens, found.demands, found.hits) == (2, 4, 2)


def make_coupled(tokens: int = 600) -> RoutingTrace:
    """Each layer chooses the layer before's expert and the next number; the first one at random."""
    first = np.random.default_rng(0).integers(0, 12, tokens)
    choices = np.stack([np.stack([(first + row) % 12, (first + row + 1) % 12], axis=-1) for row in range(4)], axis=1)
    ordered = np.zeros((tokens, 2, 4, 5), dtype=np.int16)
    for ahead in range(2):
        for place in range(5):  # the gate names the right ones first, and is off by one on each third token
            ordered[:, ahead, :, place] = (choices[:, :, 0] + place + (np.arange(tokens) % 3 == 0)[:, None]) % 12
    return trace_of(choices, foreseen=ordered, num_experts=12)


def test_recall_and_precision_of_what_is_known() -> None:
    trace = make_coupled()
    assert recall(trace, Perfect(4, 12), 1, 2) == (1.0, 1.0)
    assert recall(trace, Perfect(4, 12), 2, 4) == (1.0, 0.5)
    assert recall(trace, Gate(4, 12), 1, 2)[0] == pytest.approx(5 / 6)
    by_chance, _ = recall(trace, Chance(4, 12), 1, 3)
    assert by_chance == pytest.approx(3 / 12, abs=0.03)


@pytest.mark.parametrize("ahead", [1, 2])
def test_affinity_learns_what_follows_what(ahead: int) -> None:
    trace = make_coupled()
    assert recall(trace, Affinity(4, 12), ahead, 2, warm_up=200)[0] > 0.95
    assert recall(trace, Popularity(4, 12), ahead, 2, warm_up=200)[0] < 0.4


def test_the_blend_is_as_good_as_the_best_of_what_it_blends() -> None:
    trace = make_coupled()
    best = max(recall(trace, make(4, 12), 1, 2, warm_up=300)[0] for make in (Gate, Affinity, Popularity, Previous))
    assert recall(trace, Blend(4, 12), 1, 2, warm_up=300)[0] > best - 0.02


def test_the_token_before_is_remembered() -> None:
    trace = trace_of([[[token // 5 % 3], [token // 5 % 3]] for token in range(60)])
    assert recall(trace, Previous(2, 3), 1, 1)[0] == pytest.approx(1 - 11 / 60), (
        "each change is missed, but for the first"
    )


def test_locality_of_what_never_changes_and_of_what_is_everywhere() -> None:
    constant = trace_of([[[0, 1]]] * 64, num_experts=8)
    assert segment_routing_performance(constant) == segment_cache_hit_rate(constant) == 1.0
    assert effective_experts(constant) == pytest.approx(2.0)
    spread = uniform(640, 2, 64, 2)
    assert segment_routing_performance(spread) < 0.35
    assert segment_cache_hit_rate(spread) < 0.4
    assert effective_experts(spread) > 58
    half = trace_of([[[0, 1]], [[2, 3]]] * 32, num_experts=8)
    assert segment_cache_hit_rate(half) == 1.0 and segment_cache_hit_rate(half, cache_factor=1.0) == 0.5
    assert segment_routing_performance(half) == pytest.approx(2 / 3)


def test_a_trace_shorter_than_a_segment_tells_nothing() -> None:
    with pytest.raises(ValueError, match="3 tokens are no segment of 16"):
        segment_routing_performance(trace_of([[[0]]] * 3))


def test_synthetic_routings_are_what_they_say() -> None:
    even, uneven = uniform(2000, 2, 32, 4), skewed(2000, 2, 32, 4)
    assert effective_experts(even) > 31.5 and effective_experts(uneven) < 24
    for trace in (even, uneven, drifting(300, 2, 32, 4)):
        assert all(len(set(row)) == 4 for token in trace.choices[:50] for row in token.tolist())
    assert np.array_equal(skewed(50, 2, 8, 2, seed=3).choices, skewed(50, 2, 8, 2, seed=3).choices)
    assert replace(even, origin="x").num_tokens == 2000
