"""Logits of every family's GGUF against llama.cpp on the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from support.checkpoints import (
    FAMILIES,
    LINEAR_SCALING,
    LLAMA3_SCALING,
    VOCAB,
    YARN_SCALING,
    longrope_scaling,
    tiny_model,
)
from support.gguf_checkpoints import SIZES_FOR_K_QUANTS, gguf_checkpoint
from support.running import PlainRunner, relative_error

from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model, default_context

PROMPT = torch.randint(3, VOCAB, (20,), generator=torch.Generator().manual_seed(7)).tolist()
F32 = llama_cpp.GGML_TYPE_F32

# the CPU kernels look the tanh GELU up in a table of half-precision values
TOLERANCE = {"gemma2": 2e-3, "gemma3_text": 2e-3}


def llama_cpp_logits(path: Path, tokens: list[int], ctx: int) -> torch.Tensor:
    model = llama_cpp.Llama(
        str(path), n_ctx=ctx, logits_all=True, n_threads=2, type_k=F32, type_v=F32, use_mmap=False, verbose=False
    )
    try:
        model.eval(tokens)
        return torch.from_numpy(np.array(model.scores[: len(tokens)], dtype=np.float32))
    finally:
        model.close()


def check(path: Path, tolerance: float, ctx: int = 256) -> None:
    model = build_model(open_checkpoint(path), ctx)
    expected = llama_cpp_logits(path, PROMPT, ctx)
    assert relative_error(PlainRunner(model, ctx).logits(PROMPT), expected) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees_with_llama_cpp(family: str, tmp_path: Path) -> None:
    path = gguf_checkpoint(family, tmp_path)
    assert default_context(open_checkpoint(path)) == 256
    check(path, TOLERANCE.get(family, 1e-4))


def test_gpt_oss_agrees_with_transformers(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    found = build_model(open_checkpoint(gguf_checkpoint("gpt_oss", tmp_path)), 256)
    assert relative_error(PlainRunner(found, 256).logits(PROMPT), expected) <= 1e-4


LONGROPE: dict[str, Any] = {"rope_parameters": longrope_scaling(16), "sliding_window": None}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3_SCALING, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR_SCALING, "attention_bias": True}),
    "deepseek-v3-yarn": ("deepseek_v3", {"rope_parameters": YARN_SCALING | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek-v3-yarn-weaker": (
        "deepseek_v3",
        {"rope_parameters": YARN_SCALING | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN_SCALING}),
    "phi3-longrope": ("phi3", LONGROPE | {"original_max_position_embeddings": 24}),
    "phi3-shortrope": ("phi3", LONGROPE | {"original_max_position_embeddings": 256, "max_position_embeddings": 512}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_agrees_with_llama_cpp(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    check(gguf_checkpoint(family, tmp_path, **overrides), 1e-4)


@pytest.mark.parametrize("element", ["F16", "BF16"])
def test_halves_agree_with_llama_cpp(element: str, tmp_path: Path) -> None:
    check(gguf_checkpoint("llama", tmp_path, element), 2e-2)  # llama.cpp rounds activations to the weights' type


@pytest.mark.parametrize("element", ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"])
def test_quantized_files_agree_with_llama_cpp(element: str, tmp_path: Path) -> None:
    """Loosely: llama.cpp rounds activations to eight bits before a quantized matrix."""
    check(gguf_checkpoint("llama", tmp_path, element, num_hidden_layers=1, **SIZES_FOR_K_QUANTS), 5e-2)
