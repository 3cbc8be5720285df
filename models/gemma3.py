"""Gemma 3, text (arXiv 2503.19786): five windowed layers to one global, with rotations of their own, and head norms."""

from __future__ import annotations

from math import sqrt
from typing import Final

from offload.kernels.ops import Rope
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.gemma2 import GEMMA_NAMES, query_scale
from offload.models.hyperparameters import Settings, Shape, pattern, settings_of, sliding_windows
from offload.models.naming import rename
from offload.models.rope import gguf_rope, huggingface_rope, rope_section

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_LARGEST_LAYERS: Final = 62  # the 27B model, as in Gemma 2
_GLOBAL_THETA: Final = 1_000_000.0
_LOCAL_THETA: Final = 10_000.0


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape = Shape.read(settings, len(checkpoint.tensors))
    parts = Assembly(checkpoint, shape, canonical_name, norm_offset=0.0 if settings.is_gguf else 1.0)
    window = settings.optional_count("sliding_window")
    windows = sliding_windows(settings, shape.num_layers, window, pattern(settings, shape.num_layers, 6))
    global_rope, local_rope = ropes(settings, parts, ctx)
    for layer in range(shape.num_layers):
        parts.attention(
            layer,
            rope=global_rope if windows[layer] is None else local_rope,
            scale=query_scale(settings, shape, _LARGEST_LAYERS),
            window=windows[layer],
            softcap=settings.optional_number("attn_logit_softcapping"),
            scale_query_first=True,
            qkv_bias=settings.attention_bias,
            qk_norm="heads",
            post_norm=True,
        )
        parts.feed_forward(layer, activation=settings.activation("gelu_tanh"), post_norm=True)
    return parts.finish(
        tied=settings.tied("output.weight" in parts),
        windows=windows,
        embedding_scale=sqrt(shape.hidden_size),
        softcap=settings.optional_number("final_logit_softcapping"),
    )


def ropes(settings: Settings, parts: Assembly, ctx: int) -> tuple[Rope, Rope]:
    """The rotations of global and of windowed layers; scaling applies to the former alone."""
    if settings.is_gguf:
        wide = gguf_rope(settings, parts, ctx)
        return wide, Rope(dims=wide.dims, theta=settings.number("rope.freq_base_swa", _LOCAL_THETA))
    theta = settings.number("rope_theta", _GLOBAL_THETA)
    wide = huggingface_rope(settings, rope_section(settings, "full_attention"), parts, ctx, theta=theta)
    local = rope_section(settings, "sliding_attention", only=True)
    theta = settings.number("rope_local_base_freq", _LOCAL_THETA)
    return wide, huggingface_rope(settings, local, parts, ctx, theta=theta, name="rope_freqs_local.weight")


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name, GEMMA_NAMES)
