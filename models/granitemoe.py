"""Granite with experts (IBM, 2024): Granite's multipliers; gate and up of all experts lie in one tensor."""

from __future__ import annotations

from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.expert_assembly import Shared, add_mixture
from offload.models.hyperparameters import MixtureShape, Shape, settings_of
from offload.models.naming import EXPERT_LAYER_NAMES, rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
NAMES: Final = EXPERT_LAYER_NAMES | {
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.input_linear": "ffn_gate_up_exps",
    "block_sparse_moe.output_linear": "ffn_down_exps",
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape = Shape.read(settings, len(checkpoint.tensors))
    sizes = MixtureShape.read(settings, shape.intermediate_size)
    parts = Assembly(checkpoint, shape, canonical_name)
    rope = rope_of(settings, parts, ctx, interleaved=True)
    residual = settings.optional_number("residual_multiplier")
    width = settings.optional_count("shared_expert_intermediate_size")
    for layer in range(shape.num_layers):
        parts.attention(
            layer,
            rope=rope,
            scale=settings.optional_number("attention_multiplier") or inverse_sqrt(shape.head_dim),
            qkv_bias=settings.attention_bias,
            residual_multiplier=residual,
        )
        routing = sizes.routing(layer, normalise=True)
        add_mixture(
            parts,
            routing,
            width=sizes.width,
            activation=settings.activation("silu"),
            shared=Shared(width=width) if width else None,
            residual_multiplier=residual,
        )
    return parts.finish(
        tied=settings.tied("output.weight" in parts),
        windows=(None,) * shape.num_layers,
        embedding_scale=settings.optional_number("embedding_multiplier") or 1.0,
        logit_scale=1.0 / settings.number("logits_scaling"),
    )


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name, NAMES)
