"""Gemma 2 (arXiv 2408.00118): norms after each block, soft-capped scores and logits, every other layer windowed."""

from __future__ import annotations

from math import sqrt
from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.hyperparameters import Settings, Shape, settings_of, sliding_windows
from offload.models.naming import LAYER_NAMES, rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_LARGEST_LAYERS: Final = 46  # the 27B model, whose scale is not that of its head size; its GGUF does not say so


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape = Shape.read(settings, len(checkpoint.tensors))
    parts = Assembly(checkpoint, shape, canonical_name, norm_offset=0.0 if settings.is_gguf else 1.0)
    rope = rope_of(settings, parts, ctx)
    # llama.cpp's default for files that do not say; in a config.json, null means no window
    window = settings.count("sliding_window", 4096) if settings.is_gguf else settings.optional_count("sliding_window")
    windows = sliding_windows(settings, shape.num_layers, window, [layer % 2 == 0 for layer in range(shape.num_layers)])
    for layer in range(shape.num_layers):
        parts.attention(
            layer,
            rope=rope,
            scale=query_scale(settings, shape, _LARGEST_LAYERS),
            window=windows[layer],
            softcap=softcap(settings, "attn_logit_softcapping", 50.0),
            scale_query_first=True,
            qkv_bias=settings.attention_bias,
            post_norm=True,
        )
        parts.feed_forward(layer, activation=settings.activation("gelu_tanh"), post_norm=True)
    return parts.finish(
        tied=settings.tied("output.weight" in parts),
        windows=windows,
        embedding_scale=sqrt(shape.hidden_size),
        softcap=softcap(settings, "final_logit_softcapping", 30.0),
    )


def softcap(settings: Settings, key: str, gguf_default: float) -> float | None:
    """A soft cap; a GGUF that does not name it means `gguf_default`."""
    return settings.number(key, gguf_default) if settings.is_gguf else settings.optional_number(key)


def query_scale(settings: Settings, shape: Shape, largest_layers: int) -> float:
    """Factor on the queries, recognised in a GGUF by the number of layers as llama.cpp does."""
    if not settings.is_gguf:
        return 1 / sqrt(settings.number("query_pre_attn_scalar"))
    return inverse_sqrt(shape.hidden_size // shape.num_heads if shape.num_layers == largest_layers else shape.head_dim)


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name, GEMMA_NAMES)


GEMMA_NAMES: Final = LAYER_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
