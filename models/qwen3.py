"""Qwen 3, dense (arXiv 2505.09388): norms on the heads of query and key in place of biases."""

from __future__ import annotations

from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.hyperparameters import Shape, settings_of, upper_windows
from offload.models.naming import rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape = Shape.read(settings, len(checkpoint.tensors))
    parts = Assembly(checkpoint, shape, canonical_name)
    rope = rope_of(settings, parts, ctx)
    windows = upper_windows(settings, shape.num_layers)
    for layer in range(shape.num_layers):
        parts.attention(
            layer,
            rope=rope,
            scale=inverse_sqrt(shape.head_dim),
            window=windows[layer],
            qkv_bias=settings.attention_bias,
            qk_norm="heads",
        )
        parts.feed_forward(layer, activation=settings.activation("silu"))
    return parts.finish(tied=settings.tied("output.weight" in parts), windows=windows)


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name)
