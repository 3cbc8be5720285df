"""Logits of every family against transformers, on random float32 checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    FAMILIES,
    LINEAR_SCALING,
    LLAMA3_SCALING,
    VOCAB,
    YARN_SCALING,
    longrope_scaling,
    reference_logits,
    tiny_checkpoint,
)
from support.running import PlainRunner, relative_error

from offload.errors import UnsupportedError
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model, default_context

TOLERANCE = 1e-4
LONGROPE: dict[str, Any] = {
    "rope_parameters": longrope_scaling(16),
    "original_max_position_embeddings": 24,
    "sliding_window": None,
}
PROMPT = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(7)).tolist()


def runner(folder: Path, ctx: int = 64) -> PlainRunner:
    return PlainRunner(build_model(open_checkpoint(folder), ctx), ctx)


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; None removes them."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def test_prefill_agrees_with_transformers(family_folder: Path) -> None:
    actual = runner(family_folder).logits(PROMPT)
    assert relative_error(actual, reference_logits(family_folder, PROMPT)) <= TOLERANCE


def test_token_by_token_agrees_with_transformers(family_folder: Path) -> None:
    run = runner(family_folder)
    rows = [run.logits([token], start) for start, token in enumerate(PROMPT)]
    assert relative_error(torch.cat(rows), reference_logits(family_folder, PROMPT)) <= TOLERANCE


def test_only_the_rows_asked_for_come_out(family_folder: Path) -> None:
    run = runner(family_folder)
    run.logits(PROMPT[:12])
    rest = run.logits(PROMPT[12:], start=12, rows=[1, 7])
    expected = reference_logits(family_folder, PROMPT)[[13, 19]]
    assert rest.shape == (2, VOCAB)
    assert relative_error(rest, expected) <= TOLERANCE


def test_trained_context_is_known(family_folder: Path) -> None:
    assert default_context(open_checkpoint(family_folder)) == 256


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3_SCALING, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR_SCALING, "num_key_value_heads": 4}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_SCALING}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama-head-size": ("llama", {"head_dim": 24}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mistral-head-size": ("mistral", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2-windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-untied-yarn": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": YARN_SCALING}),
    "qwen3-tied-biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
    "gemma3-scaled": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": LINEAR_SCALING | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "gemma3-pattern": ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 2}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "smollm3-windowed": ("smollm3", {"use_sliding_window": True, "sliding_window": 4, "no_rope_layer_interval": 2}),
    "mixtral-one-of-three": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": None}),
    "qwen2-moe-some-dense": ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4, "norm_topk_prob": True}),
    "qwen3-moe-last-dense": ("qwen3_moe", {"mlp_only_layers": [2], "norm_topk_prob": False}),
    "olmoe-grouped-queries": ("olmoe", {"num_key_value_heads": 2, "norm_topk_prob": True}),
    "deepseek-v2-lite": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek-v2-groups": ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "deepseek-v3-yarn": ("deepseek_v3", {"rope_parameters": YARN_SCALING | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek-v3-two-scales": (
        "deepseek_v3",
        {"rope_parameters": YARN_SCALING | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "llama-yarn-not-rounded": ("llama", {"rope_parameters": YARN_SCALING | {"truncate": False}}),
    "glm4-moe-plain": ("glm4_moe", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "use_qk_norm": False}),
    "glm4-moe-all-experts": ("glm4_moe", {"first_k_dense_replace": 0, "attention_bias": True}),
    "granite-tied-llama3": ("granite", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_SCALING}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_agrees_with_transformers(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    folder = tiny_checkpoint(family, tmp_path, **overrides)
    assert relative_error(runner(folder).logits(PROMPT), reference_logits(folder, PROMPT)) <= TOLERANCE


@pytest.mark.parametrize("length", [20, 40])
def test_longrope_follows_the_context_of_the_run(length: int, tmp_path: Path) -> None:
    """transformers switches factors by the prompt's length, we (as llama.cpp) by the context: made equal here."""
    folder = tiny_checkpoint("phi3", tmp_path, **LONGROPE)
    prompt = (PROMPT * 2)[:length]
    expected = reference_logits(folder, prompt)
    assert relative_error(runner(folder, ctx=length).logits(prompt), expected) <= TOLERANCE
    other_ctx = 64 if length == 20 else 24
    other = PlainRunner(build_model(open_checkpoint(folder), other_ctx), 64)
    assert relative_error(other.logits(prompt), expected) > TOLERANCE


@pytest.mark.parametrize("scaling", [LLAMA3_SCALING, LINEAR_SCALING], ids=["llama3", "linear"])
def test_rope_scaling_as_older_configs_spell_it(scaling: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path, rope_parameters=scaling | {"rope_theta": 5000.0})
    expected = reference_logits(folder, PROMPT)
    old = {"type" if key == "rope_type" else key: value for key, value in scaling.items() if key != "rope_theta"}
    edit_config(folder, rope_parameters=None, rope_theta=5000.0, rope_scaling=old)
    assert relative_error(runner(folder).logits(PROMPT), expected) <= TOLERANCE


def test_gemma3_thetas_as_older_configs_spell_them(tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    folder = tiny_checkpoint("gemma3_text", tmp_path, rope_parameters=ropes)
    expected = reference_logits(folder, PROMPT)
    old = {"rope_type": "linear", "factor": 8.0}
    edit_config(folder, rope_parameters=None, rope_theta=2e6, rope_local_base_freq=3e4, rope_scaling=old)
    assert relative_error(runner(folder).logits(PROMPT), expected) <= TOLERANCE


def test_dynamic_scaling_is_plain_up_to_the_trained_context(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tiny_checkpoint("llama", tmp_path, rope_parameters=scaling)
    assert relative_error(runner(folder, ctx=256).logits(PROMPT), reference_logits(folder, PROMPT)) <= TOLERANCE
    with pytest.raises(UnsupportedError, match=r"'dynamic'.*context of 257"):
        build_model(open_checkpoint(folder), 257)
