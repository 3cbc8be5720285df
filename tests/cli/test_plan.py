import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from support.fake_engine import GIB

from offload.blocks import BlockKey, BlockSpec
from offload.cli.plan import one_more, plan_json, show
from offload.demand import Demand
from offload.errors import BudgetError
from offload.kv_plan import KVDemand
from offload.planning import make_plan, with_budget
from offload.units import format_size, format_speed


@pytest.fixture
def demand():
    blocks = tuple(BlockSpec(key=BlockKey("weight", i, f"blk.{i}.ffn_up.weight"), nbytes=GIB) for i in range(4))
    fixed = {"base": GIB // 8, "margin": GIB // 16, "vectors": 4096, "kv": GIB // 8, "workspace": GIB // 16}
    return Demand(
        blocks=blocks,
        groups=((0,), (1,), (2,), (3,)),
        embedding=None,
        fixed=fixed,
        compute_s=0.2,
        disk_bps=1.5e9,
        ctx=4096,
        trained_ctx=8192,
        prefill_tokens_per_pass=512,
    )


def drawn(plan):
    out = StringIO()
    show(plan, Console(file=out, width=100, highlight=False))
    return out.getvalue()


def test_a_streamed_plan_is_drawn_with_its_price_and_what_a_gib_would_buy(demand):
    plan = make_plan(demand, int(3.5 * GIB))
    text = drawn(plan)
    assert "disk, streamed" in text and "memory, pinned" in text
    assert "bound by disk" in text and "That is slow" in text
    more = with_budget(plan, plan.budget_bytes + GIB)
    factor = more.predicted_tps / plan.predicted_tps
    assert f"One more GiB of RAM would give about {format_speed(more.predicted_tps)} ({factor:.2f}x)" in text
    assert "A disk twice as fast would give about" in text and "VRAM" not in text


def test_a_resident_plan_streams_nothing_and_sells_nothing(demand):
    plan = make_plan(demand, 8 * GIB)
    text = drawn(plan)
    assert one_more(plan) is None and "would give" not in text and "disk, streamed" not in text
    assert "nothing: all that tokens need stays in memory" in text and "5.00 tokens/s, bound by compute" in text


def test_what_a_full_context_costs_is_said_where_it_is_felt(demand):
    assert "full context" not in drawn(make_plan(demand, 8 * GIB))
    slower = make_plan(replace(demand, attention_s=0.2), 8 * GIB)
    assert "end of the full context of 4096 tokens: about 2.50 tokens/s" in drawn(slower)
    assert plan_json(slower)["predicted_full_context_tps"] == pytest.approx(2.5)


def test_what_an_empty_context_lends_is_said(demand):
    lends = replace(demand, fixed={**demand.fixed, "kv": 2 * GIB}, kv_bucket_tokens=256, kv_bucket_bytes=GIB // 16)
    plan = make_plan(lends, int(5.5 * GIB))
    assert plan.streamed_bytes_at(0) < plan.streamed_bytes_at(4096)
    text = " ".join(drawn(plan).split())
    for part in (
        format_size(plan.streamed_bytes_at(0)),
        format_size(plan.streamed_bytes_at(4096)),
        "holds weights until then",
    ):
        assert part in text
    assert plan_json(plan)["streamed_bytes_at_start"] == plan.streamed_bytes_at(0)
    assert "holds weights" not in drawn(make_plan(demand, int(3.5 * GIB)))


def test_the_cache_on_a_device_and_in_memory_is_drawn_and_told(demand):
    kv = KVDemand(layer_bytes=GIB // 2, reaches=(4096,) * 4, device_s=1e-9, host_s=2e-9, host_bytes=GIB // 8)
    on_device = replace(demand, device_fixed={"kv": 2 * GIB}, link_bps=8e9, kv=kv).with_host_kv(frozenset())
    assert "KV cache:" not in drawn(make_plan(demand, 8 * GIB))
    for vram, there in ((8, 0), (4, 4), (3.5, 3)):
        plan = make_plan(on_device, 8 * GIB, int(vram * GIB))
        text, found = " ".join(drawn(plan).split()), json.loads(json.dumps(plan_json(plan)))
        assert found["host_kv_layers"] == sorted(plan.host_kv) and len(found["host_kv_layers"]) == there
        assert (found["device_kv_bytes"], found["kv_bytes"]) == ((4 - there) * GIB // 2, there * GIB // 2)
        assert "KV cache: 2.00 GiB" in text and ("attended to by the CPU" in text) == (there > 0)
        assert (f"{there} {format_size(there * GIB // 2)}" in text) == (there > 0)
        assert (f"{4 - there} {format_size((4 - there) * GIB // 2)} " in text) == (there < 4)


def test_json_adds_up(demand):
    plan = make_plan(demand, int(3.5 * GIB))
    found = json.loads(json.dumps(plan_json(plan)))
    tiers = {placement["tier"] for placement in found["placements"]}
    assert tiers == {"ram", "nvme"} and sum(p["bytes"] for p in found["placements"]) == plan.model_bytes
    assert found["one_more_gib"]["streamed_bytes"] < found["streamed_bytes"] == plan.streamed_bytes
    assert [better["what"] for better in found["would_buy"]] == ["ram", "disk"]
    assert found["predicted_tps"] == plan.predicted_tps and found["bound"] == "disk"


def test_the_command_plans_without_loading(invoke, engine_module, model):
    result = invoke("plan", model, "--ram", "3GiB")
    assert result.exit_code == 0 and "bound by disk" in result.stdout
    assert engine_module.loads == [
        {
            "path": model,
            "ram": "3GiB",
            "vram": None,
            "ctx": None,
            "device": "auto",
            "threads": None,
            "kv_type": "f16",
            "kv_type_k": None,
            "kv_type_v": None,
            "kv_ram": None,
            "kv_dir": None,
            "host_compute": "auto",
        }
    ]
    found = json.loads(invoke("plan", model, "--json").stdout)
    assert found["one_more_gib"]["predicted_tps"] == 2.0
    assert found["would_buy"] == [{"what": "ram", "predicted_tps": 2.0, "factor": 4.0}]


def test_a_budget_below_the_minimum_is_bad_usage(invoke, engine_module, model):
    engine_module.failure = BudgetError("--ram 1 MiB: needs at least 1.50 GiB", budget_bytes=1, minimum_bytes=2)
    result = invoke("plan", model, "--ram", "1M")
    assert result.exit_code == 2 and "at least 1.50 GiB" in result.stderr


def test_a_plan_has_no_trace(invoke, engine_module, model, tmp_path):
    result = invoke("plan", model, "--trace", tmp_path / "trace.json")
    assert result.exit_code == 2 and "--trace" in result.stderr
