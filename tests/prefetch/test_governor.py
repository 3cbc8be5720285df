"""Reading ahead stays on where it pays and goes off where it does not, by tokens timed both ways."""

from __future__ import annotations

import pytest

from offload.prefetch.governor import (
    BLOCK,
    CLEAR,
    HOLD_TOKENS,
    MOST_BLOCKS,
    STINT_TOKENS,
    WARM_UP_TOKENS,
    Governor,
    pays_at_first,
    times_as_fast,
)

BLOCK_TOKENS = len(BLOCK) * STINT_TOKENS


def run(governor: Governor, tokens: int, seconds_on: float, seconds_off: float) -> list[bool]:
    """Which of the next tokens read ahead, when that takes so long, or so long."""
    ways = []
    for _ in range(tokens):
        ways.append(governor.allows)
        governor.passed(seconds_on if governor.allows else seconds_off)
    return ways


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize(
    ("seconds", "blocks"), [((0.8, 1.0), 1), ((1.0, 0.8), 1), ((0.97, 1.0), MOST_BLOCKS), ((1.0, 0.97), MOST_BLOCKS)]
)
def test_the_faster_way_is_kept_and_found_the_sooner_the_clearer(
    prior: bool, seconds: tuple[float, float], blocks: int
) -> None:
    governor = Governor(prior=prior)
    assert set(run(governor, WARM_UP_TOKENS, *seconds)) == {prior}
    trial = run(governor, blocks * BLOCK_TOKENS, *seconds)
    assert trial.count(True) == trial.count(False) == blocks * BLOCK_TOKENS // 2
    assert set(run(governor, HOLD_TOKENS, *seconds)) == {seconds[0] < seconds[1]}
    assert set(run(governor, BLOCK_TOKENS, *seconds)) == {True, False}, "and tried again"


def test_no_trial_begins_during_another_one() -> None:
    first, second = Governor(), None
    second = Governor(beside=first)
    both = []
    for _ in range(4 * HOLD_TOKENS):
        both.append(first.is_trying and second.is_trying)
        first.passed(1.0)
        second.passed(0.8 if second.allows else 1.0)
    assert not any(both) and not second.is_trying and second.allows


def test_the_trial_is_repeated_and_may_end_differently() -> None:
    governor = Governor()
    run(governor, WARM_UP_TOKENS + BLOCK_TOKENS, 1.0, 0.8)
    assert not any(run(governor, HOLD_TOKENS, 1.0, 0.8))
    run(governor, BLOCK_TOKENS, 0.8, 1.0)
    assert governor.allows


def test_a_slow_token_now_and_then_decides_nothing() -> None:
    assert times_as_fast([1.0, 1.0, 90.0], [1.2, 1.2, 1.2]) == pytest.approx(1.2)


def test_the_first_token_of_a_stint_finds_what_the_other_way_left_and_does_not_count() -> None:
    governor = Governor()
    run(governor, WARM_UP_TOKENS, 1.0, 1.0)
    for token in range(BLOCK_TOKENS):
        first = token % STINT_TOKENS == 0
        governor.passed((9.0 if first else 1.0) if governor.allows else 1.5)
    assert set(run(governor, HOLD_TOKENS, 1.0, 1.5)) == {True}


@pytest.mark.parametrize("fixed", [True, False])
def test_who_says_so_gets_it_always_or_never(fixed: bool) -> None:
    governor = Governor(fixed, prior=not fixed)
    assert set(run(governor, 2 * (WARM_UP_TOKENS + MOST_BLOCKS * BLOCK_TOKENS), 1.0, CLEAR)) == {fixed}


def test_what_is_read_faster_than_guessed_is_not_guessed_at_first() -> None:
    assert pays_at_first(2_700_000, 3e9)
    assert not pays_at_first(54_000, 3e9)
    assert pays_at_first(54_000, 2e8), "on a slow disk"
