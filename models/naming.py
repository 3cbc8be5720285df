"""Hugging Face tensor names in GGUF's terms, as far as decoders agree. Families add what they call differently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

LAYER_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EXPERT_LAYER_NAMES: Final = LAYER_NAMES | {
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_EXPERT_ROLES: Final = {
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "w1": "ffn_gate",
    "w3": "ffn_up",
    "w2": "ffn_down",
}
_OUTER_NAMES: Final = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_WEIGHT: Final = "weight(?:_scale_inv|_scale|_zero_point)?"
_PATTERN: Final = re.compile(rf"(?:model\.|language_model\.)*(?:layers\.([0-9]+)\.)?([a-z_.]+?)\.({_WEIGHT}|bias)")
_EXPERT: Final = re.compile(
    rf"model\.layers\.([0-9]+)\.(?:mlp|block_sparse_moe)\.experts\.([0-9]+)\.([a-z_0-9]+)\.({_WEIGHT})"
)


def rename(name: str, layer_names: Mapping[str, str] = LAYER_NAMES) -> str:
    """GGUF's name of a Hugging Face tensor; a name that is not known comes back as it is."""
    expert = _EXPERT.fullmatch(name)
    if expert is not None and expert[3] in _EXPERT_ROLES:
        return f"blk.{expert[1]}.{_EXPERT_ROLES[expert[3]]}.{expert[2]}.{expert[4]}"
    match = _PATTERN.fullmatch(name)
    if match is None:
        return name
    layer, module, suffix = match.groups()
    known = (_OUTER_NAMES if layer is None else layer_names).get(module)
    if known is None:
        return name
    return f"{known}.{suffix}" if layer is None else f"blk.{layer}.{known}.{suffix}"
