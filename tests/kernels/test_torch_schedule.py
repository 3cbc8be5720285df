"""The torch backend runs whole stages: one with blocks that have to arrive stands alone, the others are merged."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint

from offload.blocks import BlockKey
from offload.elements import kv_types
from offload.kernels.torch.backend import TorchBackend
from offload.models.base import Model
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model
from offload.tiers.vram import DeviceTier


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return build_model(open_checkpoint(tiny_checkpoint("llama", tmp_path)), 64)


def test_stages_are_merged_up_to_the_next_wait(model: Model) -> None:
    backend = TorchBackend(model, 64, DeviceTier("cpu", 4096), threads=1, kv_types=kv_types("f32"))
    keys = [BlockKey("weight", stage.layer, name) for stage in model.stages for name in stage.matrices]
    (whole,) = backend.schedule(frozenset())
    assert (whole.name, whole.pinned) == (f"{model.stages[0].name} .. {model.stages[-1].name}", len(keys))
    names = model.stages[2].matrices
    streamed = frozenset({BlockKey("weight", 1, names[0]), BlockKey("weight", 1, names[2])})
    pieces = backend.schedule(streamed)
    assert [piece.name for piece in pieces] == [
        "blk.0.attention .. blk.0.feed_forward", "blk.1.attention", "blk.1.feed_forward .. head.0",
    ]  # fmt: skip
    assert pieces[1].streamed == (BlockKey("weight", 1, names[0]), BlockKey("weight", 1, names[2]))
    assert sum(piece.pinned for piece in pieces) == len(keys) - 2
    assert len(backend.schedule(frozenset(keys))) == len(model.stages)


def test_a_layers_choice_ends_a_piece_and_what_mixes_it_begins_the_next(tmp_path: Path) -> None:
    model = build_model(open_checkpoint(tiny_checkpoint("glm4_moe", tmp_path, first_k_dense_replace=1)), 64)
    backend = TorchBackend(model, 64, DeviceTier("cpu", 4096), threads=1, kv_types=kv_types("f32"))
    pieces = backend.schedule(frozenset())
    assert [(piece.mixes, piece.routes) for piece in pieces] == [(None, 1), (1, 2), (2, None)]
    assert [piece.name for piece in pieces] == [
        "blk.0.attention .. blk.1.router", "blk.1.mix .. blk.2.router", "blk.2.mix .. head.0",
    ]  # fmt: skip
    streamed = frozenset({BlockKey("weight", 2, name) for name in model.routers[2].matrices})
    assert [(piece.mixes, piece.routes) for piece in backend.schedule(streamed)] == [
        (None, 1), (1, None), (None, 2), (2, None),
    ]  # fmt: skip
