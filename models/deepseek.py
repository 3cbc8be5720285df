"""DeepSeek V2 and V3 (arXiv 2405.04434, 2412.19437), and R1: latent attention, shared experts, routing in groups.

V3 scores by sigmoid with a bias that only chooses, V2 by softmax; GGUF calls both `deepseek2`.
"""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Final

from offload.kernels.ops import Routing
from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.expert_assembly import Shared, add_mixture
from offload.models.hyperparameters import MixtureShape, Settings, Shape, grouped_routing, settings_of
from offload.models.latent import LatentShape, add_latent_attention
from offload.models.naming import EXPERT_LAYER_NAMES, rename
from offload.models.rope import rope_of, rope_section

_SHARED: Final[dict[str, object]] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
V2_DEFAULTS: Final[dict[str, object]] = _SHARED | {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 1407,
    "num_experts_per_tok": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "norm_topk_prob": False,
}
V3_DEFAULTS: Final[dict[str, object]] = _SHARED | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
}
NAMES: Final = EXPERT_LAYER_NAMES | {
    "mlp.gate_correction": "exp_probs_b",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, V2_DEFAULTS if checkpoint.architecture == "deepseek_v2" else V3_DEFAULTS)
    shape, sizes = Shape.read(settings, len(checkpoint.tensors)), MixtureShape.read(settings)
    shape = shape.without_further(settings)
    parts = Assembly(checkpoint, shape, canonical_name)
    latent = _latent(settings, parts)
    width = latent.plain + latent.rotated
    parts.shape = replace(
        shape,
        head_dim=latent.rank + latent.rotated if latent.absorbed else width,
        num_kv_heads=1 if latent.absorbed else shape.num_heads,
    )
    rope = replace(rope_of(settings, parts, ctx, dims=latent.rotated, mscale=True), interleaved=True)
    scale, activation = inverse_sqrt(width) * _growth(settings) ** 2, settings.activation("silu")
    shared = settings.optional_count("n_shared_experts")
    for layer in range(shape.num_layers):
        add_latent_attention(parts, layer, latent, rope=rope, scale=scale)
        if layer < (settings.optional_count("first_k_dense_replace") or 0):
            parts.feed_forward(layer, activation=activation)
            continue
        add_mixture(
            parts,
            _routing(settings, parts, layer, sizes),
            width=sizes.width,
            activation=activation,
            shared=Shared(width=shared * sizes.width) if shared else None,
        )
    return parts.finish(
        tied=settings.tied("output.weight" in parts),
        windows=(None,) * shape.num_layers,
        value_dim=latent.rank if latent.absorbed else latent.value,
        shares_values=latent.absorbed,
    )


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name.replace(".e_score_correction_bias", "_correction.bias"), NAMES)


def _latent(settings: Settings, parts: Assembly) -> LatentShape:
    absorbed = "blk.0.attn_k_b.weight" in parts
    if settings.is_gguf:
        kind, rotated = "_mla" if absorbed else "", settings.count("rope.dimension_count")
        plain = settings.count(f"attention.key_length{kind}") - rotated
        value = settings.count(f"attention.value_length{kind}")
    else:
        rotated, plain = settings.count("qk_rope_head_dim"), settings.count("qk_nope_head_dim")
        value = settings.count("v_head_dim")
    return LatentShape(
        plain=plain,
        rotated=rotated,
        value=value,
        rank=settings.count("kv_lora_rank"),
        query_rank=settings.count("q_lora_rank") if "blk.0.attn_q_a.weight" in parts else None,
        absorbed=absorbed,
    )


def _growth(settings: Settings) -> float:
    """By what queries and keys each grow in a context stretched by YaRN, on top of what the rotation does."""
    if settings.is_gguf:
        factor = settings.optional_number("rope.scaling.factor") or 1.0
        rate = settings.optional_number("rope.scaling.yarn_log_multiplier") or 0.0
    else:
        section = rope_section(settings)
        factor = section.optional_number("factor") or 1.0
        rate = 0.1 * (section.optional_number("mscale_all_dim") or 0.0)
    return 1.0 + rate * log(factor) if factor > 1 else 1.0


def _routing(settings: Settings, parts: Assembly, layer: int, sizes: MixtureShape) -> Routing:
    bias = f"blk.{layer}.exp_probs_b.bias" in parts
    routing = grouped_routing(
        settings,
        layer,
        sizes,
        scoring="sigmoid" if bias else "softmax",
        selection_bias="exp_probs_b.bias" if bias else None,
    )
    method = settings.text("topk_method", "noaux_tc") if not settings.is_gguf else ""
    if method == "greedy":
        return replace(routing, num_groups=1, groups_used=1)
    return replace(routing, group_top=1) if method == "group_limited_greedy" else routing
