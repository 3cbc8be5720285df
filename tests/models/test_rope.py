"""Frequencies of scaled rotations against transformers', at the sizes of real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from offload.models.checkpoint import open_checkpoint
from offload.models.layers import AttentionStage
from offload.models.registry import build_model

SCALINGS: dict[str, dict[str, Any]] = {
    "llama-3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "qwen-yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn-all-keys": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.5,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        "llama",
        tmp_path,
        rope_parameters=SCALINGS[name],
        head_dim=128,
        num_hidden_layers=1,
        max_position_embeddings=131072,
    )
    kind = SCALINGS[name]["rope_type"]
    expected, magnitude = ROPE_INIT_FUNCTIONS[kind](AutoConfig.from_pretrained(folder))
    model = build_model(open_checkpoint(folder), 4096)
    stage = model.stages[0]
    assert isinstance(stage, AttentionStage) and stage.rope is not None and stage.rope.factors is not None
    divisors = torch.tensor(model.vectors[stage.rope.factors].values, dtype=torch.float64)
    plain = stage.rope.theta ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert stage.rope.dims == 128
    assert stage.rope.magnitude == pytest.approx(magnitude)
    torch.testing.assert_close((plain / divisors).float(), expected, atol=0.0, rtol=1e-5)
