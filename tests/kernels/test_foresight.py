"""What routers of layers to come make of a hidden state: both backends, prompts and tokens, against plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.running import PlainRunner

import offload
from offload.kernels.batch import Foresight
from offload.kernels.torch.ops import TorchOps
from offload.models.checkpoint import open_checkpoint
from offload.models.mixture import RouterStage
from offload.models.registry import build_model

TOKENS = [5, 17, 60, 33, 2, 80, 44]
WIDTH = 5


def expected_orders(folder: Path, lookahead: int, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], np.ndarray]:
    """By layer and how many layers before: all experts, best first, for each token."""
    model = build_model(open_checkpoint(folder), 64)
    runner, orders = PlainRunner(model, 64), {}

    def watched(self: RouterStage, ops: TorchOps, x: torch.Tensor) -> torch.Tensor:
        for ahead, router in enumerate(model.routers_behind(self.layer, lookahead), 1):
            products = router.norm.apply(ops, x) @ runner.weights[router.routing.router].T
            scores = products.sigmoid() if router.routing.scoring == "sigmoid" else products
            if router.routing.selection_bias is not None:
                scores = scores + runner.weights[router.routing.selection_bias]
            orders[router.layer, ahead] = scores.argsort(dim=-1, descending=True).numpy()
        return forward(self, ops, x)

    forward = RouterStage.forward
    monkeypatch.setattr(RouterStage, "forward", watched)
    with torch.inference_mode():
        runner.logits(TOKENS)
    monkeypatch.undo()
    return orders


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("family", ["olmoe", "glm4_moe"])
def test_a_router_ahead_is_asked_with_the_hidden_state_at_hand(
    family: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"n_group": 1, "topk_group": 1} if family == "glm4_moe" else {}
    folder = tiny_checkpoint(family, tmp_path, **plain)
    expected = expected_orders(folder, 2, monkeypatch)
    layers = sorted({layer for layer, _ in expected})
    with offload.load(folder, ctx=64, kv_type="f32", device=device) as engine:
        backend, scheduler = engine._runner.backend, engine._runner.scheduler
        backend.set_foresight(Foresight(lookahead=2, width=WIDTH, in_prompts=True))
        scheduler.set_streamed(frozenset())
        engine.logits(TOKENS)
        for (layer, ahead), order in expected.items():
            assert np.array_equal(backend.foreseen(0, layer, ahead), order[:, :WIDTH]), (layer, ahead)
        first = min(engine._runner.opened.model.routers)
        assert len(backend.foreseen(0, first, 1)) == 0
        assert len(layers) >= 1
        engine.generate(TOKENS[:-1], max_tokens=2, temperature=0)
        assert backend.foreseen(0, layers[0], 1).shape == (1, WIDTH)


def test_only_single_tokens_guess_unless_asked(tmp_path: Path) -> None:
    folder = tiny_checkpoint("olmoe", tmp_path)
    with offload.load(folder, ctx=64) as engine:
        backend = engine._runner.backend
        plain = engine.logits(TOKENS)
        backend.set_foresight(Foresight(lookahead=1, width=99))
        engine._runner.scheduler.set_streamed(frozenset())
        assert np.array_equal(engine.logits(TOKENS), plain)
        assert backend.foreseen(0, 1, 1).shape == (0, 8), "no more are named than there are"
        engine.generate(TOKENS, max_tokens=2, temperature=0)
        assert sorted(backend.foreseen(0, 1, 1)[0]) == list(range(8))
