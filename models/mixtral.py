"""Mixtral (arXiv 2401.04088): a Mistral whose feed-forwards are experts. Its GGUF files call themselves `llama`."""

from __future__ import annotations

from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.expert_assembly import add_mixture
from offload.models.hyperparameters import MixtureShape, Shape, settings_of, sliding_windows
from offload.models.naming import EXPERT_LAYER_NAMES, rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape = Shape.read(settings, len(checkpoint.tensors))
    sizes = MixtureShape.read(settings, shape.intermediate_size)
    parts = Assembly(checkpoint, shape, canonical_name)
    rope = rope_of(settings, parts, ctx, interleaved=True)
    window = None if settings.is_gguf else settings.optional_count("sliding_window")
    windows = sliding_windows(settings, shape.num_layers, window, [True] * shape.num_layers)
    for layer in range(shape.num_layers):
        parts.attention(layer, rope=rope, scale=inverse_sqrt(shape.head_dim), window=windows[layer])
        routing = sizes.routing(layer, normalise=True)
        add_mixture(parts, routing, width=sizes.width, activation=settings.activation("silu"))
    return parts.finish(tied=settings.tied("output.weight" in parts), windows=windows)


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name, EXPERT_LAYER_NAMES | {"block_sparse_moe.gate": "ffn_gate_inp"})
