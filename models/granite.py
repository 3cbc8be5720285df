"""Granite 3 and 4, dense (IBM, 2024): a Llama with multipliers on embeddings, scores, residuals and logits."""

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
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape = Shape.read(settings, len(checkpoint.tensors))
    parts = Assembly(checkpoint, shape, canonical_name)
    # GGUF files switch the rotation off by this key; a config.json has no such switch
    is_rotated = not settings.is_gguf or settings.flag("rope.scaling.finetuned", True)
    rope = rope_of(settings, parts, ctx, interleaved=True) if is_rotated else None
    residual = settings.optional_number("residual_multiplier")
    for layer in range(shape.num_layers):
        parts.attention(
            layer,
            rope=rope,
            scale=settings.optional_number("attention_multiplier") or inverse_sqrt(shape.head_dim),
            qkv_bias=settings.attention_bias,
            residual_multiplier=residual,
        )
        parts.feed_forward(layer, activation=settings.activation("silu"), residual_multiplier=residual)
    return parts.finish(
        tied=settings.tied("output.weight" in parts),
        windows=(None,) * shape.num_layers,
        embedding_scale=settings.optional_number("embedding_multiplier") or 1.0,
        logit_scale=1.0 / settings.number("logits_scaling"),
    )


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name)
