"""SmolLM 3 (Hugging Face, 2025): a Llama whose every fourth layer has no position embedding (NoPE, arXiv 2305.19466)."""

from __future__ import annotations

from typing import Final

from offload.models.arithmetic import inverse_sqrt
from offload.models.assembly import Assembly
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.hyperparameters import Settings, Shape, settings_of, sliding_windows
from offload.models.naming import rename
from offload.models.rope import rope_of

DEFAULTS: Final[dict[str, object]] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "no_rope_layer_interval": 4,
    "attention_bias": False,
    "tie_word_embeddings": True,
}


def build(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model that a checkpoint holds, to be run with a context of `ctx` tokens."""
    settings = settings_of(checkpoint, DEFAULTS)
    shape = Shape.read(settings, len(checkpoint.tensors))
    parts = Assembly(checkpoint, shape, canonical_name)
    rope = rope_of(settings, parts, ctx, interleaved=True)
    rotated = rotated_layers(settings, shape.num_layers)
    windowed = not settings.is_gguf and settings.flag("use_sliding_window", False)
    window = settings.optional_count("sliding_window") if windowed else None
    windows = sliding_windows(settings, shape.num_layers, window, [not has_rope for has_rope in rotated])
    for layer in range(shape.num_layers):
        parts.attention(
            layer,
            rope=rope if rotated[layer] else None,
            scale=inverse_sqrt(shape.head_dim),
            window=windows[layer],
            qkv_bias=settings.attention_bias,
        )
        parts.feed_forward(layer, activation=settings.activation("silu"))
    return parts.finish(tied=settings.tied("output.weight" in parts), windows=windows)


def rotated_layers(settings: Settings, num_layers: int) -> list[bool]:
    """Which layers rotate. `no_rope_layers` holds 1 where there is a rotation, whatever its name says."""
    listed = None if settings.is_gguf else settings.sequence("no_rope_layers", num_layers)
    if listed is not None:
        return [bool(has_rope) for has_rope in listed]
    interval = settings.count("no_rope_layer_interval", 4)
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]


def canonical_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    return rename(name)
