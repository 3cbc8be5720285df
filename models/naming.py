"""Hugging Face tensor names in GGUF's terms, as far as dense decoders agree. Families add what they call differently."""

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
_OUTER_NAMES: Final = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_PATTERN: Final = re.compile(r"(?:model\.|language_model\.)*(?:layers\.([0-9]+)\.)?([a-z_.]+?)\.(weight|bias)")


def rename(name: str, layer_names: Mapping[str, str] = LAYER_NAMES) -> str:
    """GGUF's name of a Hugging Face tensor; a name that is not known comes back as it is."""
    match = _PATTERN.fullmatch(name)
    if match is None:
        return name
    layer, module, suffix = match.groups()
    known = (_OUTER_NAMES if layer is None else layer_names).get(module)
    if known is None:
        return name
    return f"{known}.{suffix}" if layer is None else f"blk.{layer}.{known}.{suffix}"
