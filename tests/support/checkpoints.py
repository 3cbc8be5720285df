"""Random checkpoints of every family, small enough to run in milliseconds.

`tiny_checkpoint` writes a Hugging Face folder with transformers, float32. Sliding windows are shorter than the prompts of
the tests, so that a forgotten window shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 320
YARN_SCALING = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7, "num_attention_heads": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 32, "num_hidden_layers": 4},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 4,
    },
    "phi3": {"sliding_window": 9},
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 5.0,
    },
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_LATENT = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
_MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": _EXPERTS | {"head_dim": 32, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "granitemoe": _OWN["granite"] | {"num_local_experts": 6, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 32,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "sliding_window": 5,
        "rope_parameters": YARN_SCALING,
    },
    "deepseek_v2": _LATENT | {"n_shared_experts": 2, "routed_scaling_factor": 1.3},
    "deepseek_v3": _LATENT | {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 1.7},
}
_OWN |= _MIXTURES
FAMILIES = tuple(_OWN)
MIXTURES = tuple(_MIXTURES)

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_SCALING = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def longrope_scaling(dims: int) -> dict[str, Any]:
    """Scaling whose short and long factors differ in every frequency; the original context is 24."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0 + 0.1 * index for index in range(dims // 2)],
        "long_factor": [2.0 + 0.7 * index for index in range(dims // 2)],
    }


def tiny_model(family: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A random model of `family` whose weights, norms and biases included, all matter to the logits."""
    config = AutoConfig.for_model(family, **(_COMMON | _OWN[family] | overrides))
    config._attn_implementation = "eager"
    torch.manual_seed(sum(family.encode()))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        biases = [pair for pair in model.named_buffers() if pair[0].endswith("e_score_correction_bias")]
        for name, parameter in (*model.named_parameters(), *biases):
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name else 0.12))
    return model


def tiny_checkpoint(family: str, folder: Path, **overrides: Any) -> Path:
    """Writes a random checkpoint of `family` into `folder` and returns the folder."""
    tiny_model(family, **overrides).save_pretrained(folder, safe_serialization=True)
    return folder


def reference_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logits of transformers, float32 [num_tokens, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]
