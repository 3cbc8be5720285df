"""OLMoE (arXiv 2409.02060): small experts, norms over the whole of query and key."""

from __future__ import annotations

from typing import Final

from offload.errors import UnsupportedError
from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.expert_assembly import add_mixture
from offload.models.hyperparameters import MixtureShape, Shape, settings_of
from offload.models.naming import EXPERT_LAYER_NAMES, rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    if settings.get("clip_qkv") is not None:
        raise UnsupportedError(f"{checkpoint.path}: clip_qkv is not supported")
    shape = Shape.read(settings, len(checkpoint.tensors))
    sizes = MixtureShape.read(settings, shape.intermediate_size)
    parts = Assembly(checkpoint, shape, canonical_name)
    rope = rope_of(settings, parts, ctx)
    for layer in range(shape.num_layers):
        parts.attention(
            layer,
            rope=rope,
            scale=inverse_sqrt(shape.head_dim),
            qkv_bias=settings.attention_bias,
            qk_norm="whole",
        )
        routing = sizes.routing(layer, normalise=not settings.is_gguf and settings.flag("norm_topk_prob", False))
        add_mixture(parts, routing, width=sizes.width, activation=settings.activation("silu"))
    return parts.finish(tied=settings.tied("output.weight" in parts), windows=(None,) * shape.num_layers)


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name, EXPERT_LAYER_NAMES)
