"""What would help is said where it helps: each row is what a plan with that one number changed predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.blocks import BlockKey, BlockSpec
from offload.demand import Demand
from offload.plan import Plan
from offload.planning import make_plan
from offload.units import GIB
from offload.what_if import WORTH_SAYING, improvements

FIXED = {"base": GIB // 8, "margin": GIB // 16, "vectors": 4096, "kv": GIB // 8, "workspace": GIB // 16}


def demand(*, disk_bps: float = 2e9, link_bps: float = 20e9, compute_s: float = 0.1, on_device: bool = False) -> Demand:
    size = GIB // 4
    blocks = tuple(BlockSpec(key=BlockKey("weight", i, f"blk.{i}.ffn_up.weight"), nbytes=size) for i in range(32))
    return Demand(
        blocks=blocks, groups=tuple((i,) for i in range(32)), embedding=None, fixed=FIXED, compute_s=compute_s,
        disk_bps=disk_bps, link_bps=link_bps, ctx=4096, trained_ctx=4096, prefill_tokens_per_pass=512,
        device_fixed={"kv": GIB // 8, "workspace": GIB // 8, "vectors": 4096} if on_device else None,
    )  # fmt: skip


def named(plan: Plan) -> list[str]:
    return [one.what for one in improvements(plan)]


@pytest.mark.parametrize(
    ("plan", "rows"),
    [
        (make_plan(demand(), 16 * GIB), []),
        (make_plan(demand(), 4 * GIB), ["ram", "disk"]),
        (make_plan(demand(compute_s=60.0), 4 * GIB), []),
        (make_plan(demand(on_device=True), 16 * GIB, 16 * GIB), []),
        (make_plan(demand(on_device=True), 16 * GIB, 4 * GIB), ["vram"]),
        (make_plan(demand(on_device=True), 2 * GIB, 4 * GIB), ["vram", "ram", "disk"]),
        (make_plan(demand(on_device=True, disk_bps=1e12), 2 * GIB, 4 * GIB), ["vram"]),
    ],
)  # fmt: skip
def test_what_helps_is_what_the_plan_waits_for(plan: Plan, rows: list[str]) -> None:
    assert named(plan) == rows


@given(
    ram=st.integers(2 * GIB, 12 * GIB), vram=st.integers(2 * GIB, 12 * GIB), disk_bps=st.floats(1e8, 2e10),
    link_bps=st.floats(1e9, 1e11), compute_s=st.floats(1e-3, 10.0), on_device=st.booleans(),
)  # fmt: skip
def test_each_row_is_a_plan_of_its_own_and_none_that_gains_is_missing(
    ram: int, vram: int, disk_bps: float, link_bps: float, compute_s: float, on_device: bool
) -> None:
    need = demand(disk_bps=disk_bps, link_bps=link_bps, compute_s=compute_s, on_device=on_device)
    device = vram if on_device else None
    plan = make_plan(need, ram, device)
    others = {
        "ram": make_plan(need, ram + GIB, device),
        "disk": make_plan(replace(need, disk_bps=2 * disk_bps), ram, device),
    } | ({"vram": make_plan(need, ram, vram + GIB)} if on_device else {})
    gains = {name: other.predicted_tps / plan.predicted_tps for name, other in others.items()}
    found = {one.what: (one.predicted_tps, one.factor) for one in improvements(plan)}
    assert found == {
        name: (others[name].predicted_tps, pytest.approx(gain)) for name, gain in gains.items() if gain >= WORTH_SAYING
    }
