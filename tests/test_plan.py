from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.bank_plan import BankDemand
from offload.blocks import BlockKey, BlockSpec
from offload.demand import Demand
from offload.errors import BudgetError
from offload.plan import EXPERT_OVERLAP_COST, OVERLAP_COST
from offload.planning import full_budget, make_plan, minimum_budget, with_budget
from offload.units import MIB


def demand(layers: int = 8, *, embedding: int = 0, disk_bps: float = 1e9) -> Demand:
    sizes = (("q", 4), ("up", 12), ("down", 16))
    blocks = tuple(
        BlockSpec(key=BlockKey("weight", layer, f"blk.{layer}.{name}"), nbytes=size * MIB)
        for layer in range(layers)
        for name, size in sizes
    )
    groups = tuple(group for layer in range(layers) for group in ((3 * layer,), (3 * layer + 1, 3 * layer + 2)))
    table = BlockSpec(key=BlockKey("weight", -1, "token_embd.weight"), nbytes=embedding) if embedding else None
    fixed = {"base": 50 * MIB, "margin": 10 * MIB, "vectors": MIB, "kv": 5 * MIB, "workspace": 7 * MIB}
    return Demand(
        blocks=blocks, groups=groups, embedding=table, fixed=fixed, compute_s=0.05, disk_bps=disk_bps,
        ctx=512,
        trained_ctx=8192, prefill_tokens_per_pass=512,
    )  # fmt: skip


@given(st.floats(0, 1), st.integers(1, 24))
def test_any_budget_between_minimum_and_all_is_kept(share: float, layers: int) -> None:
    need = demand(layers)
    least, full = minimum_budget(need), full_budget(need)
    budget = int(least + share * max(0, full - least))
    plan = make_plan(need, budget)
    assert plan.used_bytes <= budget
    assert plan.pinned_bytes + plan.streamed_bytes == sum(block.footprint for block in need.blocks)


@given(st.integers(1, 24))
def test_the_minimum_works_and_a_byte_less_does_not(layers: int) -> None:
    least = minimum_budget(demand(layers))
    assert make_plan(demand(layers), least).used_bytes <= least
    with pytest.raises(BudgetError) as caught:
        make_plan(demand(layers), least - 1)
    assert caught.value.minimum_bytes == least
    assert str(least) in str(caught.value)


@given(st.integers(0, 40))
def test_more_memory_never_streams_more(step: int) -> None:
    need = demand()
    low = minimum_budget(need) + step * 4 * MIB
    assert make_plan(need, low + 4 * MIB).streamed_bytes <= make_plan(need, low).streamed_bytes * 1.05


def test_everything_is_pinned_when_it_fits() -> None:
    plan = make_plan(demand(), full_budget(demand()))
    assert (plan.streamed_bytes, plan.ring_bytes, plan.bound) == (0, 0, "compute")
    assert plan.predicted_tps == pytest.approx(20)


def test_the_prediction_is_the_slower_of_reading_and_computing() -> None:
    need = demand(disk_bps=100 * MIB)
    plan = make_plan(need, minimum_budget(need))
    assert plan.bound == "disk"
    assert plan.predicted_tps == pytest.approx(1 / (plan.streamed_bytes / (100 * MIB) + OVERLAP_COST * plan.compute_s))


def test_the_token_table_is_pinned_last() -> None:
    need = demand(embedding=20 * MIB)
    full = full_budget(need)
    assert make_plan(need, full).embedding_bytes == 20 * MIB
    assert make_plan(need, full - 1).embedding_bytes == 0
    assert make_plan(need, full - 1).streamed_bytes == 0


def test_one_more_gib_is_a_plan_of_its_own() -> None:
    need = demand(64, disk_bps=1e9)
    plan = make_plan(need, minimum_budget(need))
    assert with_budget(plan, plan.budget_bytes + 1024 * MIB).predicted_tps > plan.predicted_tps
    assert with_budget(plan, plan.budget_bytes).predicted_tps == plan.predicted_tps


def test_streamed_blocks_are_spread_over_the_pass() -> None:
    need = replace(demand(32))
    plan = make_plan(need, full_budget(need) - 100 * MIB)
    layers = sorted(key.layer for key in plan.streamed)
    assert max(b - a for a, b in pairwise(layers)) <= 6


def test_attention_slows_a_token_that_computing_bounds_more_than_one_that_reading_bounds() -> None:
    need = replace(demand(), attention_s=0.05)
    resident, streamed = make_plan(need, full_budget(need)), make_plan(need, minimum_budget(need))
    assert resident.predicted_tps == pytest.approx(20.0)
    assert resident.predicted_tps_at(need.ctx // 2) == pytest.approx(1 / 0.075)
    assert resident.predicted_tps_at(need.ctx) == resident.predicted_tps_at(2 * need.ctx) == pytest.approx(10.0)
    assert streamed.bound == "disk"
    slower = 1 / streamed.predicted_tps_at(need.ctx) - 1 / streamed.predicted_tps
    assert slower == pytest.approx(OVERLAP_COST * need.attention_s)


def mixture(banks: int = 2) -> Demand:
    """Dense blocks as ever, and experts of several shapes: 96 of 2 MiB, then 96 of 3 MiB, 8 for each token."""
    sizes = [BankDemand(slot_bytes=(2 + i) * MIB, expert_bytes=(2 + i) * MIB - 4096, num_experts=96, least_slots=4, used=8)
             for i in range(banks)]  # fmt: skip
    return replace(demand(), banks=tuple(sizes))


@given(st.floats(0, 1))
def test_banks_get_what_dense_blocks_leave_and_never_more(share: float) -> None:
    need = mixture()
    least, full = minimum_budget(need), full_budget(need)
    plan = make_plan(need, int(least + share * (full - least)))
    assert plan.used_bytes <= plan.budget_bytes
    assert all(
        bank.least_slots <= slots <= bank.num_experts for bank, slots in zip(need.banks, plan.bank_slots, strict=True)
    )
    if plan.streamed_bytes:  # a larger cache must not push out what every token needs
        assert sum(plan.bank_slots) < sum(bank.num_experts for bank in need.banks)
    without = make_plan(replace(need, banks=()), plan.budget_bytes - minimum_budget(need) + minimum_budget(demand()))
    assert plan.streamed_bytes <= without.streamed_bytes, "dense blocks come first, whatever experts there are"


def test_experts_miss_nothing_when_all_are_there_and_most_at_the_minimum() -> None:
    need = mixture()
    everything = make_plan(need, full_budget(need))
    assert everything.bank_slots == (96, 96)
    assert (everything.missed_bytes, everything.bank_bytes_on_disk) == (0, 0)
    least = make_plan(need, minimum_budget(need))
    assert least.bank_slots == (4, 4)
    assert least.missed_bytes == pytest.approx(sum(8 * (1 - 4 / 96) * bank.expert_bytes for bank in need.banks))
    assert least.bank_bytes_on_disk == sum(92 * bank.expert_bytes for bank in need.banks)
    assert least.predicted_tps < everything.predicted_tps


@given(st.integers(0, 3000), st.integers(0, 3000), st.booleans(), st.integers(0, 500))
def test_slots_on_loan_fit_into_what_is_idle(tokens: int, more: int, prompt: bool, extra: int) -> None:
    need = replace(
        mixture(), fixed={**demand().fixed, "kv": 160 * MIB, "workspace": 40 * MIB}, ctx=2048, kv_bucket_tokens=256,
        kv_bucket_bytes=20 * MIB, prompt_bytes=30 * MIB,
    )  # fmt: skip
    everything = sum(block.footprint for block in need.blocks)
    plan = make_plan(
        need, sum(need.fixed.values()) + everything + sum(b.slot_bytes * 4 for b in need.banks) + extra * MIB
    )
    assert not plan.borrowers
    slots = plan.bank_slots_at(tokens, prompt=prompt)
    lent = sum((now - own) * bank.slot_bytes for now, own, bank in zip(slots, plan.bank_slots, need.banks, strict=True))
    assert 0 <= lent <= need.idle(tokens, prompt=prompt)
    assert plan.bank_slots_at(tokens + more, prompt=prompt) <= slots
    assert plan.missed_bytes_at(tokens + more) >= plan.missed_bytes_at(tokens)
    starved = make_plan(need, minimum_budget(need))
    assert starved.bank_slots_at(tokens) == starved.bank_slots, "blocks that every token streams come first"


def test_bringing_experts_takes_a_processor_too_and_is_overlapped_by_half() -> None:
    need = replace(mixture(1), fetch_s=0.02)
    budget = sum(need.fixed.values()) + sum(block.footprint for block in need.blocks) + 24 * need.banks[0].slot_bytes
    plan = make_plan(need, budget)
    compute_s, read_s = need.compute_s + 0.02, plan.missed_bytes / need.disk_bps
    assert plan.streamed_bytes == 0 < plan.missed_bytes
    assert 1 / plan.predicted_tps == pytest.approx(
        max(compute_s, read_s) + EXPERT_OVERLAP_COST * min(compute_s, read_s)
    )
    assert 1 / make_plan(need, full_budget(need)).predicted_tps == pytest.approx(need.compute_s)


def test_what_a_trace_says_of_hits_counts() -> None:
    need = mixture(1)
    known = replace(need, banks=tuple(replace(bank, curve=((0.25, 0.8),)) for bank in need.banks))
    budget = sum(need.fixed.values()) + sum(block.footprint for block in need.blocks) + 24 * need.banks[0].slot_bytes
    plain, traced = make_plan(need, budget), make_plan(known, budget)
    assert traced.bank_slots == plain.bank_slots == (24,)
    assert traced.missed_bytes == pytest.approx(plain.missed_bytes * 0.2 / 0.75)
    assert traced.predicted_tps > plain.predicted_tps


def test_a_budget_below_the_least_slots_is_refused() -> None:
    need = mixture()
    assert minimum_budget(need) == minimum_budget(demand()) + 4 * 2 * MIB + 4 * 3 * MIB
    with pytest.raises(BudgetError):
        make_plan(need, minimum_budget(need) - 1)
