"""Experts on a bad day: reads that fail in mid-token, cancels among guesses, two engines on one file, long runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import offload
from offload.demand import Demand
from offload.engine import Engine
from offload.errors import ClosedError, StorageError
from offload.plan import Plan
from offload.planning import make_plan
from offload.tiers.files import LocalStorage
from offload.tiers.wrapper import Fault, FaultyStorage
from offload.units import MIB

TRAINED = Path(__file__).parent / "assets" / "trained_moe" / "stdlib-olmoe-Q8_0.gguf"
PROMPT = [7 * n % 4000 for n in range(24)]
SLOTS = 44


def few_slots(need: Demand, budget: int, device: int | None) -> Plan:
    """All but experts in memory, and so many of these."""
    del budget
    dense = sum(need.fixed.values()) + sum(block.footprint for block in need.blocks)
    return make_plan(need, dense + sum(SLOTS * bank.slot_bytes for bank in need.banks), device)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    monkeypatch.setattr("offload.opening.make_plan", few_slots)
    monkeypatch.setattr("offload.host_place.CAN_DISCARD", False)  # nothing is lent: experts come and go
    return lambda **options: offload.load(TRAINED, **{"ctx": 512, "prefetch": "on"} | options)


@pytest.fixture(scope="module")
def expected() -> Iterator[tuple[int, ...]]:
    with offload.load(TRAINED, ctx=512) as engine:
        yield engine.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True).tokens


@pytest.mark.parametrize(("prefetch", "places"), [("off", range(200, 660, 46)), ("on", range(700, 1900, 120))])
def test_a_read_that_fails_ends_a_token_or_costs_a_guess(
    load: Callable[..., Engine], expected: tuple[int, ...], prefetch: str, places: range
) -> None:
    """Every token that came out is right; a demand that fails is one clear error, a guess that fails is asked for again."""
    reached = failed = 0
    for at in places:  # behind what loading reads
        storage, tokens = FaultyStorage(LocalStorage(), [Fault(at=at, kind="eio")]), []
        with load(storage=storage, prefetch=prefetch) as engine:
            try:
                for chunk in engine.stream(PROMPT, max_tokens=60, temperature=0, ignore_eos=True):
                    tokens += chunk.tokens
            except StorageError as error:
                failed += 1
                assert "\n" not in str(error) and TRAINED.name in str(error)
                with pytest.raises(ClosedError, match="load the model again"):
                    engine.generate(PROMPT, max_tokens=1)
        reached += storage.reads >= at
        assert tokens == list(expected[: len(tokens)])
        assert len(tokens) == len(expected) or failed
    assert reached > 5
    if prefetch == "off":
        assert failed == reached, "without guesses every read is needed"


def test_a_cancel_drops_guesses_and_leaves_a_working_engine(
    load: Callable[..., Engine], expected: tuple[int, ...]
) -> None:
    with load() as engine:
        for stop in (1, 5, 20, 2):
            with engine.stream(PROMPT, max_tokens=60, temperature=0, ignore_eos=True) as stream:
                for count, _ in enumerate(stream, 1):
                    if count == stop:
                        stream.cancel()
                        break
            engine.generate(PROMPT[:3], max_tokens=1, temperature=0)
        assert engine.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True).tokens == expected
        runner = engine._runner
        assert runner.telemetry.guesses > 0
        bank = next(iter(runner.scheduler._experts._banks.values()))
        runner.scheduler._experts.settle()
        assert len(bank._free) + len(bank._resident) + len(bank._guesses) + len(bank._idle) == SLOTS


def test_two_engines_share_a_file(load: Callable[..., Engine], expected: tuple[int, ...]) -> None:
    found: list[tuple[int, ...]] = []
    with load() as first, load(prefetch="off", expert_policy="lru") as second:
        threads = [
            threading.Thread(
                target=lambda engine: found.append(
                    engine.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True).tokens
                ),
                args=(engine,),
            )
            for engine in (first, second)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [expected, expected]


def test_a_long_run_holds_no_more_memory_than_a_short_one(load: Callable[..., Engine]) -> None:
    """In small; benchmarks/endurance.py runs ten thousand tokens."""
    process = psutil.Process()
    with load() as engine:
        engine.generate(PROMPT, max_tokens=300, temperature=0, ignore_eos=True)
        before = process.memory_info().rss
        for start in range(3):
            engine.generate(PROMPT[start:], max_tokens=300, temperature=0, ignore_eos=True)
        assert process.memory_info().rss - before < 4 * MIB
