"""Every family on `torch:cpu` at budgets from the least to everything: the CPU backend's tokens, the device's own bits, and
never a byte more than was asked for.

`--vram` is asked for as a person does. RAM is set in the plan: what a Python process uses is far more than a tiny model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from support.checkpoints import FAMILIES, tiny_checkpoint
from support.gguf_checkpoints import gguf_checkpoint
from test_engine import budget_at

import offload
from offload.config import LoadConfig
from offload.demand import Demand, Rates
from offload.engine import Engine
from offload.errors import BudgetError
from offload.kernels.batch import Floats
from offload.loader import plan_only
from offload.planning import full_budget, make_plan
from offload.units import PAGE

PROMPT = [7 * n % 300 for n in range(29)]
VRAM = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the way from the least to everything
RAM = (0.0, 0.5, 1.0)  # the same; each family goes through them twice, and every third begins with the same one
CASES = [*FAMILIES, "gpt_oss.gguf", "deepseek_v2.gguf", "deepseek_v3.gguf"]  # whose matrices lie otherwise in GGUF
LOAD: Final[dict[str, Any]] = {"ctx": 64, "kv_type": "f32"}


def tolerance(name: str) -> float:
    """Of the logits' range. Both backends compute in float32, and add up to 320 products in orders of their own: some twenty
    roundings (the root of 320) to a sum. ggml's GELU is a table of float16, whose roundings mostly cancel in the sum of 96.
    """
    float32, float16 = float(np.finfo(np.float32).eps), float(np.finfo(np.float16).eps)
    return float16 / 8 if name.startswith("gemma") else 20 * float32


def vram_range(need: Demand) -> tuple[int, int]:
    """The least that a device needs, as the refusal of less names it, and what holds everything."""
    with pytest.raises(BudgetError) as caught:
        make_plan(need, full_budget(need), 0)
    assert need.device_fixed is not None
    dense = sum(block.footprint for block in need.blocks)
    experts = sum(bank.num_experts * bank.device_bytes + PAGE for bank in need.banks)
    return caught.value.minimum_bytes, sum(need.device_fixed.values()) + dense + experts


def answer(engine: Engine) -> tuple[Floats, tuple[int, ...]]:
    logits = engine.logits(PROMPT)
    return logits, engine.generate(PROMPT[:17], max_tokens=6, temperature=0, ignore_eos=True).tokens


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_every_family_is_exact_and_within_its_budget_whatever_a_device_holds(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # speeds decide nothing here, so none are measured
    monkeypatch.setattr("offload.opening.machine_rates", lambda *_: Rates(disk_bps=1e9, kernel_bps={}, link_bps=8e9))
    name = CASES[number]
    model = (gguf_checkpoint if name.endswith(".gguf") else tiny_checkpoint)(name.removesuffix(".gguf"), tmp_path)
    with offload.load(model, **LOAD) as engine:
        on_cpu, expected = answer(engine)
    least, everything = vram_range(plan_only(model, LoadConfig(device="torch:cpu", **LOAD)).demand)
    held, seen = [], []
    for step, share in enumerate(VRAM):
        vram, ram = least + int(share * (everything - least)), RAM[(number + step) % len(RAM)]
        monkeypatch.setattr("offload.opening.make_plan", budget_at(ram))
        with offload.load(model, device="torch:cpu", vram=vram, **LOAD) as engine:
            plan, tier = engine.plan, engine._runner.backend._tier
            logits, tokens = answer(engine)
            assert tier.statistics().allocated_bytes + sum(plan.demand.device_fixed.values()) <= vram
        assert tokens == expected
        seen.append(logits)
        held.append(plan.device_pinned_bytes + plan.device_bank_bytes)
        from_disk = plan.streamed_bytes_at(0)
        assert from_disk == 0 if ram == 1 else from_disk > 0 or ram > 0 or share > 0.5, (share, ram)
    assert np.abs(seen[0] - on_cpu).max() <= tolerance(name) * np.ptp(on_cpu)
    assert all(np.array_equal(logits, seen[0]) for logits in seen)
    assert held[0] < held[-1] == max(held) and not plan.host_kv
    assert plan.link_bytes == 0 and list(plan.device_slots) == [bank.num_experts for bank in plan.demand.banks]
