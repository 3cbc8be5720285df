"""What is remembered of a model: written in one step, believed only when sound, and found by a replay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.bank_plan import BankDemand, interpolate, least_bytes, share_slots
from offload.errors import BackendError, StorageError
from offload.prefetch.policies import DEFAULT_EVICTION
from offload.prefetch.synthetic import skewed, uniform
from offload.trials import LEAST_GAIN, Attempt, Sample, compare, search
from offload.tuning import CURVE_SHARES, Tuning, hit_rate, learn, load_tuning, save_tuning, trace_path, tune_by_replay

MODEL = "0123456789abcdef"
TUNING = Tuning(
    policy="lfu", prefetch="off", workers=5, curves=(((0.1, 0.2), (0.5, 0.9)),), by="trial", tokens=7, origin="x"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("offload.tuning.user_cache_path", lambda name: tmp_path / name)
    return tmp_path


def test_what_was_found_is_found_again() -> None:
    assert load_tuning(MODEL) is None
    path = save_tuning(MODEL, TUNING)
    assert load_tuning(MODEL) == TUNING
    assert [file.name for file in path.parent.iterdir()] == [f"{MODEL}.json"]
    assert trace_path(MODEL).parent == path.parent


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "best"), ("prefetch", "maybe"), ("workers", 0), ("workers", "4"), ("by", "guess"), ("tokens", "9"),
        ("origin", 3), ("format", 0), ("host", "another"), ("curves", [[[0.5, 0.9], [0.1, 0.2]]]),
        ("curves", [[[0.1, 1.2]]]),
        ("policy", []), ("policy", {}), ("prefetch", None), ("workers", True), ("tokens", -1), ("origin", "\x1b[31m"),
        ("curves", [[[0.1, 10**400]]]), ("curves", [[[0.1, None]]]), ("curves", [3]), ("curves", {}),
        ("curves", [[[0.1]]]), ("curves", [[[1.0, 1.0]]]), ("curves", "x"), ("more", 1),
    ],
)  # fmt: skip
def test_what_makes_no_sense_counts_as_nothing(name: str, value: object) -> None:
    path = save_tuning(MODEL, TUNING)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {name: value}))
    assert load_tuning(MODEL) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 9])
def test_a_broken_file_counts_as_nothing(content: bytes) -> None:
    save_tuning(MODEL, TUNING).write_bytes(content)
    assert load_tuning(MODEL) is None


def test_a_folder_that_cannot_be_written_is_named(cache: Path) -> None:
    (cache / "offload").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*\.json"):
        save_tuning(MODEL, TUNING)


def test_the_default_stays_where_nothing_is_better() -> None:
    tuning = tune_by_replay(uniform(400, 3, 16, 2), 0.3)
    assert tuning.policy == DEFAULT_EVICTION
    (curve,) = tuning.curves
    assert [share for share, _ in curve] == list(CURVE_SHARES)
    for share, rate in curve:
        assert rate == pytest.approx(share, abs=0.05)


def test_another_policy_is_taken_where_it_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.tuning.DEFAULT_EVICTION", "lru")
    trace = skewed(600, 3, 32, 4)
    tuning = tune_by_replay(trace, 0.25)
    assert tuning.policy != "lru"
    assert hit_rate(trace, tuning.policy, 0.25) > hit_rate(trace, "lru", 0.25) + 0.05


@pytest.mark.parametrize(("share", "rate"), [(0.0, 0.0), (0.05, 0.2), (0.1, 0.4), (0.3, 0.65), (0.5, 0.9), (1.0, 1.0)])
def test_hit_rates_between_what_was_replayed_are_interpolated(share: float, rate: float) -> None:
    assert interpolate(((0.1, 0.4), (0.5, 0.9)), share) == pytest.approx(rate)
    assert interpolate((), share) == pytest.approx(share)


def test_banks_share_memory_in_proportion_to_what_they_could_hold() -> None:
    small = BankDemand(slot_bytes=10, expert_bytes=9, num_experts=20, least_slots=2, used=4)
    large = BankDemand(slot_bytes=20, expert_bytes=19, num_experts=40, least_slots=2, used=8, curve=((0.5, 0.75),))
    assert least_bytes((small, large)) == 60
    assert share_slots((small, large), 60) == (2, 2)
    assert share_slots((small, large), 60 + 470) == (11, 21)
    assert share_slots((small, large), 10**6) == (20, 40)
    assert share_slots((), 100) == ()
    assert small.missed_bytes(5) == 4 * 9 * 3 // 4
    assert large.missed_bytes(20) == 8 * 19 // 4


def test_a_new_trace_keeps_what_decoding_has_shown() -> None:
    trace = replace(uniform(300, 2, 16, 2), model=MODEL)
    assert learn(trace, 0.3) == tune_by_replay(trace, 0.3)
    save_tuning(MODEL, TUNING)
    learned = learn(trace, 0.3)
    assert (learned.policy, learned.prefetch, learned.workers, learned.by) == ("lfu", "off", 5, "trial")
    assert (learned.tokens, len(learned.curves[0])) == (300, len(CURVE_SHARES))
    save_tuning(MODEL, replace(TUNING, by="replay"))
    assert learn(trace, 0.3).workers is None


def test_each_bank_has_a_curve_of_its_own() -> None:
    even, uneven = uniform(400, 2, 16, 2), skewed(400, 2, 16, 2)
    choices = np.concatenate([even.choices, uneven.choices], axis=1)
    trace = replace(
        even, layers=(0, 1, 2, 3), expert_bytes=(9,) * 4, slot_bytes=(10, 10, 20, 20), banks=(0, 0, 1, 1), choices=choices,
        foreseen=np.zeros((0, 0, 0, 0), np.int16),
    )  # fmt: skip
    flat, steep = tune_by_replay(trace, 0.3).curves
    assert [rate for _, rate in flat] == pytest.approx([share for share, _ in flat], abs=0.06)
    assert dict(steep)[0.2] > dict(flat)[0.2] + 0.1


curves = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted)
banks = st.builds(
    lambda slot, experts, rates: BankDemand(
        slot_bytes=slot, expert_bytes=slot - 1, num_experts=experts, least_slots=2, used=4,
        curve=tuple(zip((0.25, 0.5, 0.75), rates, strict=True)),
    ),
    st.integers(2, 40), st.sampled_from([8, 12, 20]), curves,
)  # fmt: skip


@given(st.lists(banks, min_size=1, max_size=3), st.floats(0, 1.1), st.floats(0, 1.1))
def test_memory_goes_where_it_spares_most_and_more_never_takes_any_away(
    banks: list[BankDemand], part: float, other: float
) -> None:
    most = sum(bank.slot_bytes * bank.num_experts for bank in banks)
    least = least_bytes(banks)
    small, large = sorted(least + int(share * (most - least)) for share in (part, other))
    fewer, more = share_slots(banks, small), share_slots(banks, large)
    assert all(few <= many for few, many in zip(fewer, more, strict=True))
    for slots, available in ((fewer, small), (more, large)):
        assert sum(bank.slot_bytes * count for bank, count in zip(banks, slots, strict=True)) <= available
        assert all(bank.least_slots <= count <= bank.num_experts for bank, count in zip(banks, slots, strict=True))


def test_the_split_is_that_of_an_exhaustive_search() -> None:
    """For curves that bend down, and memory that slots divide: what is left to a greedy choice is no slot."""
    steep = BankDemand(
        slot_bytes=10, expert_bytes=10, num_experts=16, least_slots=2, used=4, curve=((0.25, 0.8), (0.5, 0.9))
    )
    flat = BankDemand(
        slot_bytes=10, expert_bytes=10, num_experts=16, least_slots=2, used=4, curve=((0.25, 0.3), (0.5, 0.6))
    )

    def missed(slots: tuple[int, int]) -> int:
        return steep.missed_bytes(slots[0]) + flat.missed_bytes(slots[1])

    for total in range(4, 33):
        found = share_slots((steep, flat), 10 * total)
        best = min(missed((first, total - first)) for first in range(2, 17) if 2 <= total - first <= 16)
        assert sum(found) == total and missed(found) <= best + 2, (total, found)  # bytes are rounded


# ---- trials


class Machine:
    """Decodes at the speed that a tuning has here, and notes what was measured."""

    def __init__(self, **speeds: float) -> None:
        self.speeds = speeds
        self.measured: list[Tuning] = []
        self.tokens = (1, 2, 3)

    def measure(self, tuning: Tuning) -> Sample:
        self.measured.append(tuning)
        speed = self.speeds.get(tuning.policy, 1.0) * self.speeds.get(tuning.prefetch, 1.0)
        return Sample(self.tokens, speed * self.speeds.get(f"workers_{tuning.workers}", 1.0))


def run(machine: Machine) -> tuple[Tuning, list[Attempt]]:
    return search(uniform(300, 2, 16, 2), 0.3, machine.measure)


def test_only_what_is_faster_both_times_is_kept() -> None:
    machine = Machine(on=1.2, off=0.8, workers_3=1.02, workers_12=1.1)
    best, attempts = run(machine)
    assert (best.prefetch, best.workers, best.by) == ("on", 12, "trial")
    assert {attempt.name: attempt.kept for attempt in attempts} == {
        "prefetch on": True, "prefetch off": False, "3 requests in flight": False, "12 requests in flight": True,
    }  # fmt: skip
    assert best.curves and best.tokens == 300


def test_a_gain_that_does_not_come_back_is_not_kept() -> None:
    ours, theirs, order = Tuning(), Tuning(policy="lfu"), []
    speeds = iter([1.0, 1.1, 1.1, 1.0, 1.0, 1.0, 1.0, 1.0])

    def measure(tuning: Tuning) -> Sample:
        order.append(tuning)
        return Sample((1,), next(speeds))

    gains = compare(ours, theirs, measure)
    assert gains[0] > LEAST_GAIN > gains[1]
    assert order == [ours, theirs, theirs, ours, theirs, ours, ours, theirs]


def test_what_loses_at_once_is_not_measured_again() -> None:
    machine = Machine(lfu=0.5)
    assert len(compare(Tuning(), Tuning(policy="lfu"), machine.measure)) == 1
    assert len(machine.measured) == 4


def test_other_tokens_end_the_search() -> None:
    machine = Machine()

    def measure(tuning: Tuning) -> Sample:
        machine.tokens = (1, 2, 3) if tuning.prefetch == "auto" else (1, 2, 4)
        return machine.measure(tuning)

    with pytest.raises(BackendError, match="different tokens"):
        search(uniform(300, 2, 16, 2), 0.3, measure)
