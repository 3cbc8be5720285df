"""GLM 4.5 to 4.7 with experts (arXiv 2508.06471): sigmoid scores in groups, a bias that only chooses, dense first layers."""

from __future__ import annotations

from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.expert_assembly import Shared, add_mixture
from offload.models.hyperparameters import MixtureShape, Shape, grouped_routing, settings_of
from offload.models.naming import EXPERT_LAYER_NAMES, rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
}
NAMES: Final = EXPERT_LAYER_NAMES | {"mlp.gate_correction": "exp_probs_b"}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape, sizes = Shape.read(settings, len(checkpoint.tensors)), MixtureShape.read(settings)
    shape = shape.without_further(settings)
    parts = Assembly(checkpoint, shape, canonical_name)
    rope, activation = rope_of(settings, parts, ctx, partial=True), settings.activation("silu")
    norm = "post_attention_norm" if settings.is_gguf else "ffn_norm"
    normed = "blk.0.attn_q_norm.weight" in parts if settings.is_gguf else settings.flag("use_qk_norm", False)
    shared = settings.optional_count("n_shared_experts")
    for layer in range(shape.num_layers):
        parts.attention(
            layer,
            rope=rope,
            scale=inverse_sqrt(shape.head_dim),
            qkv_bias=settings.attention_bias,
            qk_norm="heads" if normed else None,
        )
        if layer < (settings.optional_count("first_k_dense_replace") or 0):
            parts.feed_forward(layer, activation=activation, norm=norm)
            continue
        add_mixture(
            parts,
            grouped_routing(settings, layer, sizes, scoring="sigmoid", selection_bias="exp_probs_b.bias"),
            width=sizes.width,
            activation=activation,
            shared=Shared(width=shared * sizes.width) if shared else None,
            norm=norm,
        )
    return parts.finish(tied=settings.tied("output.weight" in parts), windows=(None,) * shape.num_layers)


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name.replace(".e_score_correction_bias", "_correction.bias"), NAMES)
