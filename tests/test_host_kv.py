"""Keys and values of some layers in host memory beside a device: its bits, within both budgets, and which layers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.gguf_checkpoints import gguf_checkpoint
from test_device_budgets import CASES, LOAD, answer
from test_plan_search import draw

import offload
from offload import planning
from offload.config import LoadConfig
from offload.demand import Demand, Rates
from offload.errors import BudgetError
from offload.kernels.torch.attention import host_attention_nbytes
from offload.kernels.torch.cache import TorchCache
from offload.kernels.torch.ops import TorchOps
from offload.kernels.torch.positions import Positions
from offload.kv_plan import KVDemand
from offload.loader import plan_only
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model
from offload.plan import Plan
from offload.planning import full_budget, make_plan, minimum_budget, minimum_device_budget
from offload.units import MIB, PAGE

DRAWS = 60


@pytest.fixture(autouse=True)
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(disk_bps=1e9, kernel_bps={}, link_bps=8e9, attention_s=2e-9, device_attention_s=1e-9, crossing_s=1e-5)
    monkeypatch.setattr("offload.opening.machine_rates", lambda *_: rates)


def with_layers_on_host(count: Callable[[int], int], share: float) -> Callable[[Demand, int, int | None], Plan]:
    """A planner that leaves so many of the layers to the host, at `share` of the way from the least VRAM to everything."""

    def plan(demand: Demand, _: int, device: int | None) -> Plan:
        assert demand.kv is not None
        order = demand.kv.order
        need = replace(demand.with_host_kv(frozenset(order[: count(len(order))])), kv=None)
        least, dense = minimum_device_budget(need), sum(block.footprint for block in need.blocks)
        return make_plan(need, full_budget(need), least + int(share * dense))

    return plan


@pytest.mark.parametrize("name", CASES)
def test_no_bit_depends_on_which_layers_are_in_host_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = (gguf_checkpoint if name.endswith(".gguf") else tiny_checkpoint)(name.removesuffix(".gguf"), tmp_path)
    seen = []
    for count, share in ((lambda _: 0, 1.0), (lambda _: 1, 0.3), (lambda n: n - 1, 1.0), (lambda n: n, 0.0)):
        monkeypatch.setattr("offload.opening.make_plan", with_layers_on_host(count, share))
        for kv_type in ("f32", "f16"):
            with offload.load(model, device="torch:cpu", **{**LOAD, "kv_type": kv_type}) as engine:
                plan, backend = engine.plan, engine._runner.backend
                layers = engine._runner.opened.model.config.num_layers
                cache, on_host = backend._cache, plan.host_kv
                assert len(on_host) == count(layers) and cache.on_host == on_host
                kept = sum(tensor.nbytes for layer in range(layers) for tensor in cache.rows(layer, 0, LOAD["ctx"]))
                assert cache.nbytes == plan.device_kv_bytes == kept * (layers - len(on_host)) // layers
                assert (cache._slab.nbytes if on_host else 0) <= plan.kv_bytes + 2 * len(on_host) * PAGE
                fixed = sum(plan.demand.device_fixed.values())
                assert fixed + backend._tier.statistics().allocated_bytes <= plan.device_budget_bytes
                seen.append((kv_type, *answer(engine)))
    for kv_type, logits, tokens in seen:
        expected = next(one for one in seen if one[0] == kv_type)
        assert np.array_equal(logits, expected[1]) and tokens == expected[2]


def test_a_budget_that_was_too_small_loads(tmp_path: Path) -> None:
    model, load = tiny_checkpoint("llama", tmp_path, max_position_embeddings=4096), {"ctx": 4096, "device": "torch:cpu"}
    with offload.load(model, vram=64 * MIB, **load) as engine:
        expected, everything = answer(engine), engine.plan
        assert not everything.host_kv and not everything.link_bytes
    least = minimum_device_budget(plan_only(model, LoadConfig(**load)).demand)
    assert least < everything.device_kv_bytes
    with pytest.raises(BudgetError, match=r"^--vram .* would do"):
        offload.load(model, vram=least - 1, **load)
    with pytest.raises(BudgetError, match=r"^--vram .* would do") as caught:
        offload.load(model, vram=least, host_compute="off", **load)
    assert caught.value.minimum_bytes > everything.device_kv_bytes
    with offload.load(model, vram=least, **load) as engine:
        assert engine.plan.device_kv_bytes == 0 and engine.plan.kv_bytes >= everything.device_kv_bytes
        assert engine.plan.used_bytes <= engine.plan.budget_bytes
        found = answer(engine)
    assert np.array_equal(found[0], expected[0]) and found[1] == expected[1]


def drawn(rng: random.Random) -> Demand:
    """A few blocks, and up to five layers of cache that are about as large; some look at a window only."""
    ctx, layers, device_s = 1024, rng.randint(1, 5), rng.choice((0.0, 1e-12))
    kv = KVDemand(
        layer_bytes=rng.randint(1, 8) * PAGE, reaches=tuple(rng.choice((ctx, ctx, 128)) for _ in range(layers)),
        device_s=device_s, host_s=device_s * 0.9 + rng.choice((0.0, 1e-10, 1e-9, 5e-9)), crossing_s=rng.choice((0.0, 1e-7)),
        device_bytes=rng.randint(0, 2) * PAGE, host_bytes=rng.randint(0, 2) * PAGE,
    )  # fmt: skip
    need = replace(
        draw(rng), ctx=ctx, kv=kv, device_fixed={"kv": layers * kv.layer_bytes, "attention": kv.device_bytes}
    )
    return need.with_host_kv(frozenset())


def test_layers_are_placed_as_an_exhaustive_search_would() -> None:
    rng, counts, refused = random.Random(5), set(), 0
    for _ in range(DRAWS):
        need = drawn(rng)
        assert need.kv is not None and need.device_fixed is not None
        layers = range(len(need.kv.reaches))
        dense = sum(block.footprint for block in need.blocks)
        most = dense + sum(need.device_fixed.values())
        vram = rng.choice((most, *(rng.randrange(minimum_device_budget(need) // 2, most, PAGE) for _ in range(4))))
        ram = minimum_budget(need) + rng.randrange(0, dense + len(layers) * need.kv.layer_bytes + 2 * PAGE, PAGE)
        subsets = [frozenset(chosen) for count in range(len(layers) + 1) for chosen in combinations(layers, count)]
        plans = [planning._on_device(need.with_host_kv(subset), ram, vram) for subset in subsets]
        best = min((plan.seconds_at(need.ctx) for plan in plans if plan is not None), default=None)
        if best is None:
            refused += 1
            with pytest.raises(BudgetError) as caught:
                make_plan(need, ram, vram)
            budgets = (
                (ram, caught.value.minimum_bytes)
                if "--vram" in str(caught.value)
                else (caught.value.minimum_bytes, vram)
            )
            assert make_plan(need, *budgets), "what is named would do"
            continue
        plan = make_plan(need, ram, vram)
        placed = plan.demand
        if most <= vram:
            assert not placed.host_kv and not plan.link_bytes
        else:
            assert plan.seconds_at(need.ctx) == pytest.approx(best, rel=1e-9)
        assert placed.device_fixed is not None
        held = plan.device_pinned_bytes + plan.device_ring_bytes
        assert plan.used_bytes <= ram and sum(placed.device_fixed.values()) + held <= vram
        assert plan.device_kv_bytes == (len(layers) - len(placed.host_kv)) * need.kv.layer_bytes
        assert make_plan(placed, ram, vram) == plan, "a plan made again is the same"
        counts.add((not placed.host_kv, len(placed.host_kv) == len(layers)))
    assert counts == {(True, False), (False, False), (False, True)} and 0 < refused < DRAWS // 2


def test_what_costs_the_cpu_least_goes_first_and_the_rest_is_spread() -> None:
    kv = KVDemand(layer_bytes=PAGE, reaches=(64, 4096, 64, 4096, 64, 4096, 4096, 4096), device_s=1e-9, host_s=2e-9)
    assert set(kv.order[:3]) == {0, 2, 4} and sorted(kv.order) == list(range(8))
    first, second = sorted(kv.order[3:5])
    assert second - first > 1
    assert kv.attention_s({0, 1}) == pytest.approx(1e-9 * (sum(kv.reaches) + 64 + 4096))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v2.gguf"])
@pytest.mark.parametrize("tokens", [1, 256])
def test_what_attention_takes_of_host_memory_is_within_what_is_planned(name: str, tokens: int, tmp_path: Path) -> None:
    ctx, make = 1024, gguf_checkpoint if name.endswith(".gguf") else tiny_checkpoint
    model = build_model(open_checkpoint(make(name.removesuffix(".gguf"), tmp_path, max_position_embeddings=ctx)), ctx)
    config, attention = model.config, max(model.attentions, key=lambda kind: kind.window is None)
    dims = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    features = (config.head_dim, config.head_dim, config.value_dim or config.head_dim)
    cpu = torch.device("cpu")
    dtypes = [torch.float16] * len(config.cache_dims)
    cache = TorchCache(
        config.num_layers, ctx, config.num_kv_heads, config.cache_dims, dtypes, cpu, frozenset({attention.layer})
    )
    positions = Positions(torch.arange(ctx - tokens, ctx), ctx, first=ctx - tokens)
    positions.mask(attention.window)
    ops = TorchOps(lambda _: torch.zeros(config.num_heads), cache, positions, torch.tensor([0]), None, positions)
    given = [torch.ones(tokens, heads, dim) for heads, dim in zip(dims, features, strict=True)]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        ops.attention(*given, attention)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    taken += sum(room.nbytes for room in cache._loaded)
    assert 0.4 < taken / host_attention_nbytes(model, ctx, tokens, torch.get_num_threads()) <= 1
