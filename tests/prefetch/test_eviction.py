"""What goes first: what every policy must do, what each is for, and random work against a plain model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.blocks import ExpertKey
from offload.errors import UsageError
from offload.prefetch.eviction import (
    Eviction,
    HitDensity,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    OneBit,
    RecencyFrequency,
    Regret,
)
from offload.prefetch.policies import EVICTION, make_eviction

LAYERS, EXPERTS = (2, 3, 5), 8
every = pytest.mark.parametrize("name", EVICTION)


def held(policy: Eviction, *keys: tuple[int, int]) -> None:
    for key in keys:
        policy.add(ExpertKey(*key))


def all_victims(policy: Eviction, layer: int = 2, keep: Sequence[ExpertKey] = ()) -> list[tuple[int, int]]:
    return [tuple(key) for key in policy.victims(layer, 99, keep)]


@every
def test_what_passes_goes_before_all_that_a_token_has_used(name: str) -> None:
    policy = make_eviction(name, LAYERS, EXPERTS)
    held(policy, (2, 1), (3, 1), (5, 1))
    for layer in LAYERS:
        policy.chosen(layer, [1])
    policy.add(ExpertKey(2, 7), passing=True)
    assert policy.victims(3, 1, ()) == [ExpertKey(2, 7)]
    policy.chosen(2, [7])
    for layer in LAYERS:
        policy.chosen(layer, [7])
    policy.add(ExpertKey(5, 0), passing=True)
    assert policy.victims(3, 1, ()) == [ExpertKey(5, 0)], "what a token has used passes no longer"


@every
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_victims_are_held_and_not_kept_and_as_many_as_there_are(name: str, data: st.DataObject) -> None:
    policy, model = make_eviction(name, LAYERS, EXPERTS), set()
    keys = st.builds(ExpertKey, st.sampled_from(LAYERS), st.integers(0, EXPERTS - 1))
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["add", "remove", "choose", "ask"])):
            case "add":
                if (key := data.draw(keys)) not in model:
                    policy.add(key, passing=data.draw(st.booleans()))
                    model.add(key)
            case "remove" if model:
                key = data.draw(st.sampled_from(sorted(model)))
                policy.remove(key)
                model.remove(key)
            case "choose":
                layer = data.draw(st.sampled_from(LAYERS))
                policy.chosen(layer, data.draw(st.lists(st.integers(0, EXPERTS - 1), min_size=1, unique=True)))
            case "ask":
                keep, count = set(data.draw(st.lists(keys))), data.draw(st.integers(0, 30))
                victims = policy.victims(data.draw(st.sampled_from(LAYERS)), count, keep)
                assert set(victims) <= model - keep
                assert len(victims) == len(set(victims)) == min(count, len(model - keep))


def test_least_recently_used_is_an_order_of_uses() -> None:
    policy = LeastRecentlyUsed(LAYERS, EXPERTS)
    held(policy, (2, 1), (3, 2), (5, 3))
    for layer, expert in ((3, 2), (2, 1), (5, 3), (3, 2)):
        policy.chosen(layer, [expert])
    assert all_victims(policy) == [(2, 1), (5, 3), (3, 2)]


def test_least_frequently_used_counts_and_breaks_ties_by_recency() -> None:
    policy = LeastFrequentlyUsed(LAYERS, EXPERTS)
    held(policy, (2, 1), (2, 2), (2, 3))
    for experts in ([1], [1], [2], [3]):
        policy.chosen(2, experts)
    assert all_victims(policy) == [(2, 2), (2, 3), (2, 1)]


def test_what_was_chosen_while_away_counts_when_it_comes_back() -> None:
    policy = LeastFrequentlyUsed(LAYERS, EXPERTS)
    for _ in range(3):
        policy.chosen(2, [4])
    policy.chosen(2, [5])
    held(policy, (2, 4), (2, 5))
    assert all_victims(policy)[0] == (2, 5)


def test_of_equals_what_is_needed_last_goes_first() -> None:
    policy = RecencyFrequency(LAYERS, EXPERTS)
    held(policy, (2, 1), (3, 1), (5, 1))
    for layer in LAYERS:
        policy.chosen(layer, [1])
    assert all_victims(policy, layer=3) == [(3, 1), (2, 1), (5, 1)], "a token at layer 3 comes to 5 next, then to 2"


@pytest.mark.parametrize(("half_life", "first"), [(1.0, (2, 1)), (1000.0, (2, 2))])
def test_the_half_life_shifts_from_recency_to_frequency(half_life: float, first: tuple[int, int]) -> None:
    policy = RecencyFrequency(LAYERS, EXPERTS, half_life=half_life)
    held(policy, (2, 1), (2, 2))
    for experts in ([1], [1], [1], [2], [3]):
        policy.chosen(2, experts)
    assert all_victims(policy)[0] == first


def test_early_layers_can_be_favoured() -> None:
    orders = []
    for shallow in (0.0, 3.0):
        policy = RecencyFrequency(LAYERS, EXPERTS, shallow=shallow)
        held(policy, (2, 1), (5, 1))
        policy.chosen(2, [1])
        policy.chosen(2, [2])
        policy.chosen(5, [1])
        orders.append(all_victims(policy, layer=3)[0])
    assert orders == [(2, 1), (5, 1)]


def test_hit_density_learns_that_a_model_alternates() -> None:
    """Experts 0 and 1 come every second token: what was just used is what is needed last, against recency."""
    policy, recent = HitDensity((0,), EXPERTS), LeastRecentlyUsed((0,), EXPERTS)
    for one in (policy, recent):
        for token in range(400):
            one.chosen(0, [token % 2])
        held(one, (0, 0), (0, 1))
        one.chosen(0, [0])
    assert all_victims(policy, 0)[0] == (0, 0)
    assert all_victims(recent, 0)[0] == (0, 1)


def test_one_bit_evicts_no_marked_expert_while_there_is_another() -> None:
    policy = OneBit((0,), EXPERTS)
    held(policy, *((0, expert) for expert in range(4)))
    policy.chosen(0, [2, 3])
    assert {expert for _, expert in all_victims(policy, 0)[:2]} == {0, 1}
    policy.chosen(0, [0, 1])  # all are marked: a new phase, in which the bits decide
    assert len(all_victims(policy, 0)) == 4


def test_regret_leaves_the_side_that_was_wrong() -> None:
    policy = Regret((0,), EXPERTS)
    before = policy._weight
    for _ in range(60):  # expert 0 is popular, and is evicted after each pause by recency's word
        for experts in ([0], [0], [0], [1], [2], [3], [4]):
            policy.chosen(0, experts)
        held(policy, (0, 0))
        policy.remove(ExpertKey(0, 0))
    assert policy._weight < before


def test_a_policy_that_nobody_knows_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"expert policy 'best': choose auto, lru, lfu, .*regret"):
        make_eviction("best", LAYERS, EXPERTS)


def test_counters_stay_finite_over_many_tokens() -> None:
    random = np.random.default_rng(0)
    for name in EVICTION:
        policy = make_eviction(name, (0, 1), EXPERTS)
        held(policy, *((layer, expert) for layer in (0, 1) for expert in range(EXPERTS)))
        for _ in range(3000):
            for layer in (0, 1):
                policy.chosen(layer, random.permutation(EXPERTS)[:2].tolist())
        assert len(all_victims(policy, 0)) == 2 * EXPERTS
