"""What is written down is what the routers decided, and writing it down changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import tiny_checkpoint
from transformers import AutoModelForCausalLM

import offload
from offload.demand import Demand
from offload.errors import UsageError
from offload.plan import Plan
from offload.planning import full_budget, make_plan, minimum_budget
from offload.prefetch.routing import NOBODY, RoutingTrace
from offload.prefetch.trace_file import decode, encode

TOKENS = [int(token) for token in np.random.default_rng(4).integers(0, 300, 50)]


def budget_at(share: float) -> Callable[[Demand, int, int | None], Plan]:
    def plan(demand: Demand, _: int, device: int | None) -> Plan:
        least = minimum_budget(demand)
        return make_plan(demand, int(least + share * (full_budget(demand) - least)), device)

    return plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"))


def transformers_choices(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(3, dim=-1).indices for layer in logits], dim=1).numpy()


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_choices_are_those_of_transformers(
    folder: Path, share: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.opening.make_plan", budget_at(share))
    with offload.load(folder, ctx=64, kv_type="f32", device=device) as engine:
        before = engine.logits(TOKENS)
        trace = engine.record_routing(TOKENS, origin="test")
        assert np.array_equal(engine.logits(TOKENS), before)
    expected = transformers_choices(folder)
    assert np.array_equal(np.sort(trace.choices), np.sort(expected))
    assert trace.passes.tolist() == list(range(50)), "each token of a text counts as decoded"
    assert (trace.layers, trace.num_experts, trace.num_used, trace.lookahead) == ((0, 1, 2), 8, 3, 3)
    assert (trace.foreseen[:, 0, 1:] >= 0).all() and (trace.foreseen[:, 0, 0] == NOBODY).all()
    right = [
        set(guess[:3]) == set(choice)
        for guess, choice in zip(trace.foreseen[:, 0, 2], trace.choices[:, 2], strict=True)
    ]
    assert trace.origin == "test" and 0 <= sum(right) <= 50


def test_an_answer_is_recorded_pass_by_pass(folder: Path) -> None:
    with offload.load(folder, ctx=64) as engine:
        plain = engine.generate(TOKENS[:9], max_tokens=6, temperature=0, ignore_eos=True)
        trace = engine.record_routing(TOKENS[:9], max_tokens=6, temperature=0, ignore_eos=True)
        assert engine.generate(TOKENS[:9], max_tokens=6, temperature=0, ignore_eos=True).tokens == plain.tokens
    assert trace.passes.tolist() == [0] * 1 + [1, 2, 3, 4, 5], "the prompt was in the cache but for its last token"
    assert (trace.choices >= 0).all()


def test_the_last_layer_of_a_prompt_only_computes_what_is_asked_for(folder: Path) -> None:
    with offload.load(folder, ctx=64) as engine:
        trace = engine.record_routing(TOKENS[:9], max_tokens=1, temperature=0)
    assert (trace.choices[:8, 2] == NOBODY).all() and (trace.choices[8] >= 0).all()
    assert (trace.choices[:, :2] >= 0).all() and trace.passes.tolist() == [0] * 9


def test_parts_of_a_text_are_joined(folder: Path) -> None:
    with offload.load(folder, ctx=64) as engine:
        parts = [engine.record_routing(TOKENS[:20]), engine.record_routing(TOKENS[20:])]
    whole = RoutingTrace.joined(parts)
    assert whole.num_tokens == 50 and whole.passes.tolist() == list(range(50))
    assert np.array_equal(whole.choices[20:], parts[1].choices)
    assert np.array_equal(whole.last(7).foreseen, parts[1].foreseen[-7:])


def test_memory_that_a_run_needs_beside_experts_is_in_the_trace(folder: Path) -> None:
    with offload.load(folder, ctx=64) as engine:
        trace, demand = engine.record_routing(TOKENS), engine.plan.demand
    assert sum(trace.slots(full_budget(demand) - trace.fixed_bytes).values()) == 24
    assert trace.fixed_bytes < full_budget(demand)


def test_a_model_without_experts_has_no_routing(tmp_path: Path) -> None:
    with (
        offload.load(tiny_checkpoint("llama", tmp_path), ctx=64) as engine,
        pytest.raises(UsageError, match="no experts"),
    ):
        engine.record_routing([1, 2, 3])


def test_log_likelihood_is_that_of_transformers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)[range(49), TOKENS[1:]].numpy()
    with offload.load(folder, ctx=64, kv_type="f32") as engine:
        assert np.abs(engine.log_likelihood(TOKENS) - expected).max() < 1e-3


def test_where_routers_are_streamed_choices_are_recorded_without_guesses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that passes through the ring cannot be asked layers before its turn."""
    folder = tiny_checkpoint("olmoe", tmp_path, num_hidden_layers=12)
    monkeypatch.setattr("offload.opening.make_plan", budget_at(0.0))
    monkeypatch.setattr("offload.host_place.CAN_DISCARD", False)  # nothing is lent: routers stay away
    with offload.load(folder, ctx=64, kv_type="f32") as engine:
        streamed = {key.name for key in engine.plan.streamed}
        assert any("ffn_gate_inp" in name for name in streamed)
        before = engine.logits(TOKENS)
        trace = engine.record_routing(TOKENS)
        assert np.array_equal(engine.logits(TOKENS), before)
    assert np.array_equal(np.sort(trace.choices), np.sort(transformers_choices(folder)))
    assert trace.lookahead == 0
    assert np.array_equal(decode(encode(trace)).choices, trace.choices)
