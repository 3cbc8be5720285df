"""Weights in memory that the cache and prompts do not use yet: the same tokens, the same budget, nothing left half done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import demand

import offload
from offload.blocks import BlockKey
from offload.borrowers import BlockBorrower
from offload.config import FEW_TOKENS, KV_BUCKET
from offload.demand import Demand
from offload.engine import Engine
from offload.errors import Cancelled
from offload.lending import CacheMemory, IdleMemory, Lending, Range
from offload.plan import LOAN_GRAIN, Plan
from offload.planning import make_plan, minimum_budget
from offload.tiers.base import CancelToken
from offload.tiers.heap import can_trim_heap
from offload.tiers.ram import CAN_DISCARD, Slab
from offload.units import MIB, PAGE, align_up

TRAINED = Path(__file__).parent / "assets" / "trained_moe" / "stdlib-olmoe-Q8_0.gguf"

pytestmark = pytest.mark.skipif(
    not (CAN_DISCARD and can_trim_heap()), reason="this system does not give memory back, so nothing is lent"
)


def lending_demand(buckets: int = 8, bucket_mib: int = 20, prompt_mib: int = 30) -> Demand:
    need = demand(16)
    fixed = {**need.fixed, "kv": buckets * bucket_mib * MIB, "workspace": (7 + prompt_mib) * MIB}
    return replace(
        need, fixed=fixed, ctx=buckets * 256, kv_bucket_tokens=256,
        kv_bucket_bytes=bucket_mib * MIB, prompt_bytes=prompt_mib * MIB,
    )  # fmt: skip


@given(st.integers(0, 3000), st.integers(0, 3000), st.booleans(), st.integers(0, 400))
def test_loans_fit_into_what_is_idle_and_shrink_as_the_cache_fills(
    tokens: int, more: int, prompt: bool, extra: int
) -> None:
    need = lending_demand()
    plan = make_plan(need, minimum_budget(need) + extra * MIB)
    lent = [block.footprint for block in plan.borrowers[: plan.on_loan(tokens, prompt=prompt)]]
    assert align_up(sum(lent), LOAN_GRAIN) <= need.idle(tokens, prompt=prompt)
    assert plan.on_loan(tokens + more, prompt=prompt) <= plan.on_loan(tokens, prompt=prompt)
    assert plan.on_loan(tokens, prompt=True) <= plan.on_loan(tokens, prompt=False)


def test_a_loan_makes_an_empty_context_faster_and_a_full_one_no_slower() -> None:
    need = replace(lending_demand(), disk_bps=100 * MIB)
    stingy = replace(need, kv_bucket_bytes=0, prompt_bytes=0)
    budget = minimum_budget(need) + 50 * MIB
    plan, without = make_plan(need, budget), make_plan(stingy, budget)
    assert plan.used_bytes <= budget
    assert (
        plan.streamed_bytes_at(0) < plan.streamed_bytes_at(1000) < plan.streamed_bytes == without.streamed_bytes_at(0)
    )
    assert plan.predicted_tps > 1.5 * without.predicted_tps
    assert plan.predicted_tps_at(need.ctx) >= without.predicted_tps_at(need.ctx)


def test_nothing_is_lent_where_everything_is_pinned() -> None:
    assert make_plan(lending_demand(), 2**40).borrowers == ()


# ---- the cache's pages


def resident() -> int:
    return psutil.Process().memory_info().rss


def test_the_caches_pages_come_and_go_with_its_tokens() -> None:
    slab = Slab(64 * MIB, huge_pages=False, prefault=False)
    cache = CacheMemory(slab, lambda first, last: [Range(first * 8 * MIB, (last - first) * 8 * MIB)], KV_BUCKET)
    start = resident()
    cache.resize(1)
    slab.view(0, 1)[0] = 7
    cache.resize(4 * KV_BUCKET)
    assert 30 * MIB < resident() - start < 36 * MIB
    slab.view(24 * MIB, 1)[0] = 9
    cache.resize(KV_BUCKET)
    assert resident() - start < 12 * MIB
    cache.resize(8 * KV_BUCKET)
    assert resident() - start > 60 * MIB
    assert (slab.view(0, 1)[0], slab.view(24 * MIB, 1)[0]) == (7, 0)
    slab.close()


# ---- moving the border


class Recorder:
    """Stands in for residency and reader: what is pinned and streamed, and a pin that can fail."""

    def __init__(self, plan: Plan) -> None:
        self.streamed: frozenset[BlockKey] = plan.streamed
        self.pinned: set[BlockKey] = set()
        self.moved: list[frozenset[BlockKey]] = []
        self.fails = False
        self.ended: list[str] = []

    def pin(self, blocks, slab, reader, *, offset, cancel) -> None:
        assert offset + sum(block.footprint for block in blocks) <= slab.nbytes
        assert not self.streamed & {block.key for block in blocks}, "what is being pinned must not be streamed"
        self.pinned |= {block.key for block in blocks}
        if self.fails:
            raise Cancelled("cancelled")

    def unpin(self, blocks) -> None:
        self.pinned -= {block.key for block in blocks}

    def stream(self, keys) -> None:
        self.streamed = keys

    def read_ahead(self) -> None:
        pass

    def cancel_pending(self) -> int:
        self.ended.append("cancel_pending")
        return 0

    def drain(self) -> None:
        self.ended.append("drain")


Border = tuple[Plan, Recorder, Lending]


@contextmanager
def make_border() -> Iterator[Border]:
    need = lending_demand()
    plan = make_plan(need, minimum_budget(need))
    recorder = Recorder(plan)
    slab = Slab(sum(block.footprint for block in plan.borrowers[: plan.on_loan(0)]), prefault=False)
    memory = Slab(8 * PAGE, huge_pages=False, prefault=False)
    cache = CacheMemory(memory, lambda first, last: [Range(first * PAGE, (last - first) * PAGE)], 256)
    idle = IdleMemory(cache, lambda: None)
    borrower = BlockBorrower(plan, slab, recorder, recorder, recorder.moved.append)  # type: ignore[arg-type]
    yield plan, recorder, Lending(idle, borrower)
    slab.close()
    memory.close()


@pytest.fixture
def border() -> Iterator[Border]:
    with make_border() as made:
        yield made


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2048), st.sampled_from([1, FEW_TOKENS, FEW_TOKENS + 1, 900])), max_size=12))
def test_every_block_is_either_pinned_or_streamed_whatever_was_asked_before(asked: list[tuple[int, int]]) -> None:
    with make_border() as (plan, recorder, lending):
        for positions, pass_tokens in asked:
            if pass_tokens > 1:
                lending.make_room(positions, pass_tokens)
            else:
                lending.lend(positions)
            assert recorder.pinned | recorder.streamed == plan.streamed
            assert not recorder.pinned & recorder.streamed
            assert recorder.moved == [] or recorder.moved[-1] == recorder.streamed
            prompt = pass_tokens > FEW_TOKENS
            assert align_up(lending.nbytes, LOAN_GRAIN) <= plan.demand.idle(positions, prompt=prompt)
            if pass_tokens == 1:
                assert len(recorder.pinned) == plan.on_loan(positions)


def test_a_loan_that_was_cancelled_is_undone_and_made_the_next_time(border: Border) -> None:
    plan, recorder, lending = border
    recorder.fails = True
    with pytest.raises(Cancelled):
        lending.lend(1)
    assert (recorder.pinned, recorder.streamed, lending.nbytes) == (set(), plan.streamed, 0)
    assert recorder.ended == ["cancel_pending", "drain"]
    recorder.fails = False
    lending.lend(1)
    assert len(recorder.pinned) == plan.on_loan(1) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages as Linux does")
def test_lent_memory_leaves_the_process_when_it_is_taken_back(border: Border) -> None:
    _, _, lending = border
    start = resident()
    lending.lend(1)
    assert resident() - start > lending.nbytes - LOAN_GRAIN > 100 * MIB
    lending.lend(2048)
    assert resident() - start < 40 * MIB


# ---- a real model


@pytest.fixture(scope="module")
def streaming(demo: Path) -> Iterator[Engine]:
    with offload.load(demo, ram="minimum", ctx=2048) as engine:
        yield engine


@pytest.fixture(scope="module")
def whole(demo: Path) -> Iterator[Engine]:
    with offload.load(demo, ctx=2048) as engine:
        yield engine


def test_what_is_idle_is_lent_before_the_first_prompt_comes(demo: Path) -> None:
    with offload.load(demo, ram="minimum", ctx=2048) as engine:
        runner = engine._runner
        assert runner.lent_bytes > 0 and not runner.lend(2)
        engine.generate([2, 3, 4], max_tokens=2, temperature=0)
        statistics = engine.statistics()
        assert statistics.wait_s + statistics.compute_s + statistics.other_s == pytest.approx(runner.telemetry.pass_s)
        before = runner.lent_bytes
        runner.make_room(2048, 1)
        assert runner.lent_bytes < before
        assert runner.lend(2) and not runner.lend(2)
        assert runner.lent_bytes == before


PROMPTS = (12, 900, 20, 250, 1500, 40)


def test_a_session_with_loans_says_what_one_without_them_says(streaming: Engine, whole: Engine) -> None:
    assert whole.plan.borrowers == ()
    text = " ".join(f"Line {number}: the river runs {number * 7} miles to the sea." for number in range(120))
    tokens = whole.tokenize(text)
    lent = []
    for length in PROMPTS:
        ours, theirs = (
            engine.generate(tokens[:length], max_tokens=16, temperature=0, ignore_eos=True)
            for engine in (streaming, whole)
        )
        assert ours.tokens == theirs.tokens
        lent.append(ours.residency["ram"].bytes - streaming.plan.pinned_bytes)
        assert ours.residency["ram"].bytes + ours.residency["nvme"].bytes == (
            streaming.plan.pinned_bytes + streaming.plan.streamed_bytes
        )
    by_length = [nbytes for _, nbytes in sorted(zip(PROMPTS, lent, strict=True))]
    assert by_length == sorted(by_length, reverse=True)
    assert by_length[0] > by_length[-1]


def test_experts_borrow_where_no_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts take the memory back, tokens get it again, and nothing that is said depends on it."""

    def roomy(need: Demand, budget: int, device: int | None) -> Plan:
        del budget
        dense = sum(need.fixed.values()) + sum(block.footprint for block in need.blocks)
        return make_plan(need, dense + sum(40 * bank.slot_bytes for bank in need.banks), device)

    with offload.load(TRAINED, ctx=2048) as whole:
        expected = [
            whole.generate([7 * n % 4000 for n in range(length)], max_tokens=12, temperature=0, ignore_eos=True).tokens
            for length in PROMPTS
        ]
    monkeypatch.setattr("offload.opening.make_plan", roomy)
    with offload.load(TRAINED, ctx=2048, prefetch="on") as engine:
        plan, runner = engine.plan, engine._runner
        assert not plan.borrowers and plan.bank_slots == (40,)
        for length, tokens in zip(PROMPTS, expected, strict=True):
            prompt = [7 * n % 4000 for n in range(length)]
            answer = engine.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True)
            assert answer.tokens == tokens
            slots = tuple(bank.num_slots for bank in runner._lending._borrower._banks)
            assert slots == plan.bank_slots_at(length + 12) > plan.bank_slots
        lent = runner.lent_bytes
        runner.make_room(2048, 900)
        assert runner.lent_bytes < lent, "a prompt takes back what it needs"
        assert engine.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True).tokens == expected[-1]


def test_a_cancelled_loan_leaves_a_working_engine(streaming: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = streaming.generate([1] * 60, max_tokens=4, temperature=0).tokens
    streaming._runner.lend(streaming.ctx)  # the whole cache is in use: everything that can be taken back is
    residency = streaming._runner._lending._borrower._residency
    original = residency.pin

    def cancelled(*args: object, cancel: CancelToken, **options: object) -> None:
        cancel.cancel()
        original(*args, cancel=cancel, **options)

    monkeypatch.setattr(residency, "pin", cancelled)
    answer = streaming.generate([2, 3, 4], max_tokens=4, temperature=0)
    assert answer.finish_reason == "cancelled"
    monkeypatch.undo()
    assert streaming.generate([1] * 60, max_tokens=4, temperature=0).tokens == expected


def test_weights_are_in_memory_or_on_disk_and_nowhere_twice() -> None:
    with offload.load(TRAINED, ctx=512, ram="minimum") as engine:
        least = engine.plan.budget_bytes
        nbytes = engine.plan.model_bytes
    for more in (0, 2 * MIB, 5 * MIB, 9 * MIB, 100 * MIB):
        with offload.load(TRAINED, ctx=512, ram=least + more) as engine:
            engine.generate([1, 2, 3], max_tokens=4, temperature=0, ignore_eos=True)
            found = {tier: use.bytes for tier, use in engine.statistics().residency.items()}
        assert min(found.values()) >= 0
        assert sum(found.values()) == pytest.approx(nbytes, rel=0.02), "blocks are counted in pages"
