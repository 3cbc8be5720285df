"""gpt-oss (OpenAI, arXiv 2508.10925): sinks in attention, every other layer windowed, biased experts, often in MXFP4."""

from __future__ import annotations

from typing import Final

from offload.errors import UnsupportedError
from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.expert_assembly import add_mixture
from offload.models.hyperparameters import MixtureShape, Shape, pattern, settings_of, sliding_windows
from offload.models.naming import EXPERT_LAYER_NAMES, rename
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


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    if checkpoint.format != "gguf":
        raise UnsupportedError(
            f"{checkpoint.path}: gpt-oss is run from GGUF files only; its safetensors are not supported"
        )
    settings = settings_of(checkpoint, DEFAULTS)
    shape, sizes = Shape.read(settings, len(checkpoint.tensors)), MixtureShape.read(settings)
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
    """GGUF's name of a Hugging Face tensor."""
    return rename(name, EXPERT_LAYER_NAMES)
