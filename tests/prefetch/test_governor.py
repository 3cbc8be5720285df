"""Reading ahead stays on where it pays and goes off where it does not, by tokens timed both ways."""

from __future__ import annotations

import pytest

from offload.prefetch.governor import HOLD_TOKENS, STINT_TOKENS, TRIAL, WARM_UP_TOKENS, Governor, is_faster

TRIAL_TOKENS = len(TRIAL) * STINT_TOKENS


def run(governor: Governor, tokens: int, seconds_on: float, seconds_off: float) -> list[bool]:
    """Which of the next tokens read ahead, when that takes so long, or so long."""
    ways = []
    for _ in range(tokens):
        ways.append(governor.allows)
        governor.passed(seconds_on if governor.allows else seconds_off)
    return ways


@pytest.mark.parametrize("pays", [True, False])
def test_the_faster_way_is_kept(pays: bool) -> None:
    governor = Governor()
    seconds = (0.9, 1.0) if pays else (1.0, 0.9)
    assert all(run(governor, WARM_UP_TOKENS, *seconds))
    trial = run(governor, TRIAL_TOKENS, *seconds)
    assert trial.count(True) == trial.count(False) == TRIAL_TOKENS // 2
    assert set(run(governor, HOLD_TOKENS, *seconds)) == {pays}


def test_the_trial_is_repeated_and_may_end_differently() -> None:
    governor = Governor()
    run(governor, WARM_UP_TOKENS + TRIAL_TOKENS, 1.0, 0.9)
    assert not any(run(governor, HOLD_TOKENS, 1.0, 0.9))
    run(governor, TRIAL_TOKENS, 0.9, 1.0)
    assert governor.allows


def test_a_slow_token_now_and_then_decides_nothing() -> None:
    assert is_faster([1.0, 1.0, 90.0], [1.1, 1.1, 1.1])


def test_the_first_token_of_a_stint_finds_what_the_other_way_left_and_does_not_count() -> None:
    governor = Governor()
    run(governor, WARM_UP_TOKENS, 1.0, 1.0)
    for token in range(TRIAL_TOKENS):
        first = token % STINT_TOKENS == 0
        governor.passed((9.0 if first else 1.0) if governor.allows else 1.5)
    assert governor.allows


@pytest.mark.parametrize("fixed", [True, False])
def test_who_says_so_gets_it_always_or_never(fixed: bool) -> None:
    governor = Governor(fixed)
    assert set(run(governor, 2 * (WARM_UP_TOKENS + TRIAL_TOKENS), 1.0, 1.0)) == {fixed}
