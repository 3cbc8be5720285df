"""gpt-oss (OpenAI, arXiv 2508.10925): sinks in attention, every other layer windowed, biased experts, often in MXFP4."""

from __future__ import annotations

import re
from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.expert_assembly import add_mixture
from offload.models.hyperparameters import MixtureShape, Shape, pattern, settings_of, sliding_windows
from offload.models.naming import LAYER_NAMES, rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
}

SCHEMES: Final = ("mxfp4",)
"""In which safetensors may be quantized."""
_LAYER_NAMES: Final = LAYER_NAMES | {
    "mlp.router": "ffn_gate_inp",
    "post_attention_layernorm": "post_attention_norm",
}
_OWN_NAME: Final = re.compile(r"model\.layers\.([0-9]+)\.(self_attn\.sinks|mlp\.experts\.[a-z_]+)")


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS, SCHEMES)
    shape = Shape.read(settings, len(checkpoint.tensors))
    sizes = MixtureShape.read(settings, None if settings.is_gguf else shape.intermediate_size)
    parts = Assembly(checkpoint, shape, canonical_name)
    rope = rope_of(settings, parts, ctx)
    window = settings.optional_count("sliding_window")
    windows = sliding_windows(settings, shape.num_layers, window, pattern(settings, shape.num_layers, 2))
    for layer in range(shape.num_layers):
        scale = inverse_sqrt(shape.head_dim)
        parts.attention(layer, rope=rope, scale=scale, window=windows[layer], qkv_bias=True, sinks=True)
        routing = sizes.routing(layer, scoring="softmax_of_chosen")
        add_mixture(parts, routing, width=sizes.width, activation="swiglu_oai", norm="post_attention_norm")
    return parts.finish(tied=settings.tied("output.weight" in parts), windows=windows)


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor, where it has one; what experts are stored as has not."""
    match = _OWN_NAME.fullmatch(name)
    if match is None:
        return rename(name, _LAYER_NAMES)
    layer, module = match.groups()
    return f"blk.{layer}.{'attn_sinks.weight' if module == 'self_attn.sinks' else module.removeprefix('mlp.')}"
