"""Phi 3, 3.5 and 4, dense (arXiv 2404.14219): fused projections, longrope, in Phi 4 mini a partial rotation."""

from __future__ import annotations

from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.hyperparameters import Shape, settings_of, sliding_windows
from offload.models.naming import LAYER_NAMES, rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape = Shape.read(settings, len(checkpoint.tensors))
    parts = Assembly(checkpoint, shape, canonical_name)
    rope = rope_of(settings, parts, ctx, partial=True)
    # GGUF files of this family carry windows that were never meant; llama.cpp ignores them too
    window = None if settings.is_gguf else settings.optional_count("sliding_window")
    windows = sliding_windows(settings, shape.num_layers, window, [True] * shape.num_layers)
    for layer in range(shape.num_layers):
        scale = inverse_sqrt(shape.head_dim)
        parts.attention(layer, rope=rope, scale=scale, window=windows[layer], scale_query_first=True)
        parts.feed_forward(layer, activation=settings.activation("silu"), fused=True)
    return parts.finish(tied=settings.tied("output.weight" in parts), windows=windows)


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name, LAYER_NAMES | {"mlp.gate_up_proj": "ffn_up"})
