"""Which architectures there are, and the one function that turns a checkpoint into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from offload.errors import UnsupportedError
from offload.models import (
    deepseek,
    gemma2,
    gemma3,
    glm4_moe,
    gpt_oss,
    granite,
    granitemoe,
    llama,
    mistral,
    mixtral,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.models.checkpoint.reader import quote
from offload.models.hyperparameters import settings_of


class Family(NamedTuple):
    """An architecture: how to build it, what its config.json may leave out, and in which schemes it may be quantized."""

    build: Callable[[Checkpoint, int], Model]
    defaults: Mapping[str, object]
    schemes: tuple[str, ...] = ()


FAMILIES: Final[Mapping[str, Family]] = {
    "deepseek_v2": Family(deepseek.build, deepseek.V2_DEFAULTS),
    "deepseek_v3": Family(deepseek.build, deepseek.V3_DEFAULTS),
    "gemma2": Family(gemma2.build, gemma2.DEFAULTS),
    "gemma3": Family(gemma3.build, gemma3.DEFAULTS),
    "gemma3_text": Family(gemma3.build, gemma3.DEFAULTS),
    "glm4_moe": Family(glm4_moe.build, glm4_moe.DEFAULTS),
    "gpt_oss": Family(gpt_oss.build, gpt_oss.DEFAULTS, gpt_oss.SCHEMES),
    "granite": Family(granite.build, granite.DEFAULTS),
    "granitemoe": Family(granitemoe.build, granitemoe.DEFAULTS),
    "llama": Family(llama.build, llama.DEFAULTS),
    "mistral": Family(mistral.build, mistral.DEFAULTS),
    "mixtral": Family(mixtral.build, mixtral.DEFAULTS),
    "olmoe": Family(olmoe.build, olmoe.DEFAULTS),
    "phi3": Family(phi3.build, phi3.DEFAULTS),
    "qwen2": Family(qwen2.build, qwen2.DEFAULTS),
    "qwen2_moe": Family(qwen2_moe.build, qwen2_moe.DEFAULTS),
    "qwen3": Family(qwen3.build, qwen3.DEFAULTS),
    "qwen3_moe": Family(qwen3_moe.build, qwen3_moe.DEFAULTS),
    "smollm3": Family(smollm3.build, smollm3.DEFAULTS),
}
"""By `model_type` of a config.json, which most often is `general.architecture` of a GGUF too."""
GGUF_FAMILIES: Final = {
    "deepseek2": "deepseek_v3",
    "glm4moe": "glm4_moe",
    "gpt-oss": "gpt_oss",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
"""By `general.architecture`, where that is another name."""


def build_model(checkpoint: Checkpoint, ctx: int) -> Model:
    """The model of a checkpoint, to be run with a context of `ctx` tokens.

    Raises:
        UnsupportedError: an architecture, or a feature of one, that is not implemented.
        CheckpointError: a tensor or a number is missing, or contradicts another.
    """
    return _family(checkpoint).build(checkpoint, ctx)


def default_context(checkpoint: Checkpoint) -> int:
    """The context length that the model was trained for, in tokens.

    Raises:
        UnsupportedError: the architecture is not implemented.
        CheckpointError: the length is missing or not a positive integer.
    """
    family = _family(checkpoint)
    return settings_of(checkpoint, family.defaults, family.schemes).count("max_position_embeddings")


def _family(checkpoint: Checkpoint) -> Family:
    family = FAMILIES.get(_family_name(checkpoint))
    if family is None:
        known = f"this version runs {', '.join(sorted(FAMILIES))}"
        experts = any("expert" in key for key in (*checkpoint.metadata, *checkpoint.tensors))
        kind = " is a mixture of experts, which is not supported yet" if experts else " is not supported"
        raise UnsupportedError(f"{checkpoint.path}: architecture {quote(checkpoint.architecture)}{kind}; {known}")
    return family


def _family_name(checkpoint: Checkpoint) -> str:
    name = checkpoint.architecture
    if checkpoint.format != "gguf":
        return name
    if name == "llama" and checkpoint.metadata.get("llama.expert_count"):
        return "mixtral"
    return GGUF_FAMILIES.get(name, name)
