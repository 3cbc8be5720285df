"""Qwen 1.5 and 2 with experts (arXiv 2407.10671): a shared expert beside them, weighted by a gate of its own."""

from __future__ import annotations

from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.expert_assembly import Shared, add_mixture
from offload.models.hyperparameters import MixtureShape, Shape, is_sparse, settings_of, upper_windows
from offload.models.naming import EXPERT_LAYER_NAMES, rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape, sizes = Shape.read(settings, len(checkpoint.tensors)), MixtureShape.read(settings)
    parts = Assembly(checkpoint, shape, canonical_name)
    rope, activation = rope_of(settings, parts, ctx), settings.activation("silu")
    windows = upper_windows(settings, shape.num_layers)
    shared = Shared(width=settings.count("shared_expert_intermediate_size"), gated=True)
    for layer in range(shape.num_layers):
        parts.attention(layer, rope=rope, scale=inverse_sqrt(shape.head_dim), window=windows[layer], qkv_bias=True)
        if is_sparse(settings, layer):
            routing = sizes.routing(layer, normalise=not settings.is_gguf and settings.flag("norm_topk_prob", False))
            add_mixture(parts, routing, width=sizes.width, activation=activation, shared=shared)
        else:
            parts.feed_forward(layer, activation=activation)
    return parts.finish(tied=settings.tied("output.weight" in parts), windows=windows)


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name, EXPERT_LAYER_NAMES)
