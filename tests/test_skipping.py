"""Experts with little weight are left out when asked: the same at every budget, on both backends, and as arithmetic says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import tiny_checkpoint
from test_recording import budget_at
from transformers import AutoModelForCausalLM

import offload
from offload.errors import UsageError

TOKENS = [int(token) for token in np.random.default_rng(2).integers(0, 300, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"))


def logits(folder: Path, **options: object) -> tuple[np.ndarray, tuple[int, ...], int]:
    with offload.load(folder, ctx=64, kv_type="f32", **options) as engine:
        values = engine.logits(TOKENS)
        answer = engine.generate(TOKENS[:5], max_tokens=20, temperature=0, ignore_eos=True)
        use = engine.statistics().experts
    return values, answer.tokens, 0 if use is None else use.skipped


def reference(folder: Path, below: float) -> np.ndarray:
    """transformers, with the weights of light experts set to zero."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def lighten(module: torch.nn.Module, given: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        scores, weights, chosen = output
        return scores, weights * (weights >= below * weights.sum(-1, keepdim=True)), chosen

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lighten)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("below", [0.2, 0.3, 1.0])
def test_what_is_left_out_is_what_weighs_little(folder: Path, below: float, device: str) -> None:
    plain, _, _ = logits(folder, device=device)
    found, _, skipped = logits(folder, device=device, skip_experts_below=below)
    expected = reference(folder, below)
    assert skipped > 0 and np.abs(found - plain).max() > 1e-2
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


def test_the_same_is_left_out_at_every_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr("offload.opening.make_plan", budget_at(share))
        seen.append(logits(folder, skip_experts_below=0.25))
    for values, tokens, skipped in seen[1:]:
        assert np.array_equal(values, seen[0][0])
        assert (tokens, skipped) == seen[0][1:]


def test_a_threshold_that_nothing_is_below_changes_no_bit(folder: Path) -> None:
    plain, tokens, _ = logits(folder)
    found, same, skipped = logits(folder, skip_experts_below=1e-9)
    assert np.array_equal(found, plain) and (same, skipped) == (tokens, 0)


@pytest.mark.parametrize("below", [-0.1, 1.1, "much", float("nan")])
def test_a_threshold_is_a_share(folder: Path, below: object) -> None:
    with pytest.raises(UsageError, match="skip_experts_below"):
        offload.load(folder, skip_experts_below=below)


def test_a_trace_is_of_all_that_routers_choose(folder: Path) -> None:
    with offload.load(folder, ctx=64, skip_experts_below=0.1) as engine, pytest.raises(UsageError, match="all experts"):
        engine.record_routing(TOKENS)
