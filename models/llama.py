"""Llama 1 to 3.3 (arXiv 2302.13971, 2407.21783), and whatever GGUF calls `llama`, such as Mistral and SmolLM2."""

from __future__ import annotations

from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.hyperparameters import Shape, settings_of
from offload.models.naming import rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape = Shape.read(settings, len(checkpoint.tensors))
    parts = Assembly(checkpoint, shape, canonical_name)
    rope = rope_of(settings, parts, ctx, interleaved=True)
    for layer in range(shape.num_layers):
        parts.attention(layer, rope=rope, scale=inverse_sqrt(shape.head_dim), qkv_bias=settings.attention_bias)
        parts.feed_forward(layer, activation=settings.activation("silu"))
    return parts.finish(tied=settings.tied("output.weight" in parts), windows=(None,) * shape.num_layers)


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name)
