"""Numbers that describe a model, read from GGUF metadata or config.json and checked before anything is sized by them.

A number is asked for under Hugging Face's name; `GGUF_KEYS` has GGUF's. Knows no architecture and no tensor.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeGuard

from offload.errors import CheckpointError, UnsupportedError
from offload.kernels.ops import Activation, Routing, Scoring
from offload.models.checkpoint.base import Checkpoint
from offload.models.checkpoint.reader import is_name, quote
from offload.models.quantization import check_scheme

GGUF_KEYS: Final = {
    "attention_multiplier": "attention.scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "embedding_multiplier": "embedding_scale",
    "final_logit_softcapping": "final_logit_softcapping",
    "first_k_dense_replace": "leading_dense_block_count",
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "kv_lora_rank": "attention.kv_lora_rank",
    "logits_scaling": "logit_scale",
    "max_position_embeddings": "context_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_group": "expert_group_count",
    "n_shared_experts": "expert_shared_count",
    "norm_topk_prob": "expert_weights_norm",
    "num_attention_heads": "attention.head_count",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "q_lora_rank": "attention.q_lora_rank",
    "residual_multiplier": "residual_scale",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "routed_scaling_factor": "expert_weights_scale",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
    "topk_group": "expert_group_used_count",
}
_ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_EXPERT_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")  # as families spell it
_GATING: Final[dict[int, Scoring]] = {1: "softmax", 2: "sigmoid", 3: "softmax_of_chosen"}  # llama.cpp's numbers
_LARGEST_COUNT: Final = 2**31 - 1
_SMALLEST: Final = 1e-30
_LARGEST: Final = 1e30


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked access to the metadata of a checkpoint, or to one section of it.

    Every getter raises CheckpointError, with file, key and value, when the key is missing and no default is given or when
    the value is not what the getter promises. A null value counts as missing.
    """

    path: Path
    values: Mapping[str, object]
    prefix: str = ""

    @property
    def is_gguf(self) -> bool:
        return bool(self.prefix)

    def get(self, key: str) -> object:
        """The raw value, or None. Of an array of equal elements, as GGUF may have one per layer, that element."""
        value = self.values.get(self.name(key))
        if self.is_gguf and key in GGUF_KEYS and isinstance(value, Sequence) and not isinstance(value, str):
            if not value or any(item != value[0] for item in value):
                raise UnsupportedError(f"{self.path}: {self.name(key)} differs between layers, which is not supported")
            return value[0]
        return value

    def name(self, key: str) -> str:
        """The key as the file spells it."""
        return self.prefix + GGUF_KEYS.get(key, key) if self.is_gguf else key

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST_COUNT:
            raise self._wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number within reason: from 1e-30 to 1e30."""
        value = self._value(key, default)
        if not _is_sane(value):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None where the key is missing, null or zero."""
        return self.number(key) if self.get(key) else None

    def optional_count(self, key: str) -> int | None:
        """A positive integer, or None where the key is missing, null or zero."""
        return self.count(key) if self.get(key) else None

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """The name of something: a short string that is safe to print."""
        value = self._value(key, default)
        if not isinstance(value, str) or not is_name(value):
            raise self._wrong(key, value, "a name")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self._value(key, None)
        listed = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
        numbers = tuple(float(item) for item in listed if _is_sane(item))
        if not numbers or len(numbers) != len(listed):
            raise self._wrong(key, value, "a list of positive numbers")
        return numbers

    def sequence(self, key: str, length: int) -> tuple[object, ...] | None:
        """A list of `length` elements, or None where the key is missing."""
        value = self.values.get(self.name(key))
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != length:
            raise self._wrong(key, value, f"a list of {length}")
        return tuple(value)

    def section(self, key: str) -> Settings | None:
        """A nested object of config.json, or None where the key is missing."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return Settings(self.path, value)

    @property
    def attention_bias(self) -> bool:
        """Whether a config.json promises biases on query, key and value."""
        return not self.is_gguf and self.flag("attention_bias", False)

    def tied(self, has_output: bool) -> bool:
        """Whether the head's matrix is the token table. A GGUF says it by having no other."""
        return not has_output if self.is_gguf else self.flag("tie_word_embeddings", False)

    def activation(self, expected: Activation) -> Activation:
        """The feed-forward's activation. GGUF has none on record: it is the family's.

        Raises:
            UnsupportedError: the config names another one that is not known.
        """
        if self.is_gguf:
            return expected
        name = self.text("hidden_activation" if self.get("hidden_activation") else "hidden_act", expected)
        if name not in _ACTIVATIONS:
            raise UnsupportedError(f"{self.path}: activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def _value(self, key: str, default: object) -> object:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: {self.name(key)} is missing from the metadata", path=str(self.path))
        return value

    def _wrong(self, key: str, value: object, expected: str) -> CheckpointError:
        message = f"{self.path}: {self.name(key)} is {quote(value)}; expected {expected}"
        return CheckpointError(message, path=str(self.path))


def _is_sane(value: object) -> TypeGuard[float]:
    """Neither an overflow nor a loss of all digits can come of products and logarithms of a few of these."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and _SMALLEST <= value <= _LARGEST


def settings_of(checkpoint: Checkpoint, defaults: Mapping[str, object], schemes: Collection[str] = ()) -> Settings:
    """The settings of a checkpoint; `defaults` stand in for absent keys of a config.json, never for those of a GGUF.

    Args:
        schemes: in which a Hugging Face checkpoint of the family may be quantized, beside those of FP8.

    Raises:
        UnsupportedError: the weights are quantized in a scheme of their own, or there are experts where none belong.
    """
    if checkpoint.format == "gguf":
        settings = Settings(checkpoint.path, checkpoint.metadata, f"{checkpoint.architecture}.")
        if settings.get("num_experts") and "num_experts_per_tok" not in defaults:
            raise UnsupportedError(f"{checkpoint.path}: {checkpoint.architecture} with experts is not supported")
        return settings
    config = Settings(checkpoint.path, checkpoint.metadata)
    quantization = config.section("quantization_config")
    if quantization is not None:
        check_scheme(checkpoint.path, quantization.text("quant_method", "unknown"), quantization.values, schemes)
    config = config.section("text_config") or config
    return Settings(checkpoint.path, ChainMap(dict(config.values), dict(defaults)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes that all tensors follow from.

    Attributes:
        intermediate_size: width of the gated feed-forward.
        vocab_size: rows of the token table; None where the file leaves it to the table (GGUF).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int
    vocab_size: int | None
    eps: float

    @classmethod
    def read(cls, settings: Settings, num_tensors: int) -> Shape:
        """Reads and checks the sizes. `num_tensors` bounds the number of layers.

        Raises:
            CheckpointError: a size is missing, not positive, or contradicts another.
        """
        num_heads, hidden_size = settings.count("num_attention_heads"), settings.count("hidden_size")
        shape = cls(
            num_layers=settings.count("num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=settings.count("num_key_value_heads", num_heads),
            head_dim=settings.count("head_dim", max(1, hidden_size // num_heads)),
            intermediate_size=settings.count("intermediate_size"),
            context_length=settings.count("max_position_embeddings"),
            vocab_size=None if settings.is_gguf else settings.count("vocab_size"),
            eps=settings.number("rms_norm_eps"),
        )
        problem = shape._contradiction(num_tensors)
        if problem:
            raise CheckpointError(f"{settings.path}: {problem}", path=str(settings.path))
        return shape

    def without_further(self, settings: Settings) -> Shape:
        """Without the layers that predict further tokens: GGUF files count them, and they come last."""
        further = settings.optional_count("nextn_predict_layers") if settings.is_gguf else None
        return replace(self, num_layers=max(1, self.num_layers - (further or 0)))

    def _contradiction(self, num_tensors: int) -> str:
        if self.num_layers > num_tensors:
            return f"{self.num_layers} layers are declared, but the file has only {num_tensors} tensors"
        if self.num_heads % self.num_kv_heads:
            return f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads evenly"
        if self.head_dim % 2:
            return f"heads of {self.head_dim} features cannot be rotated in pairs"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureShape:
    """The sizes of layers with experts: how many there are, how many a token uses, and how wide each is."""

    num_experts: int
    num_used: int
    width: int

    @classmethod
    def read(cls, settings: Settings, width: int | None = None) -> MixtureShape:
        """Reads and checks the sizes.

        Args:
            width: where the family's experts have the width of its dense layers.

        Raises:
            CheckpointError: a size is missing, not positive, or contradicts another.
        """
        key = next((key for key in _EXPERT_COUNTS if settings.get(key) is not None), _EXPERT_COUNTS[0])
        num_experts, num_used = settings.count(key), settings.count("num_experts_per_tok")
        if num_used > num_experts:
            message = f"{settings.path}: a token cannot use {num_used} of {num_experts} experts"
            raise CheckpointError(message, path=str(settings.path))
        width = settings.count("moe_intermediate_size") if width is None else width
        return cls(num_experts=num_experts, num_used=num_used, width=width)

    def routing(self, layer: int, *, scoring: Scoring = "softmax", normalise: bool = False) -> Routing:
        """The routing of a layer that compares all experts with each other."""
        return Routing(
            layer=layer,
            router="ffn_gate_inp",
            num_experts=self.num_experts,
            num_used=self.num_used,
            scoring=scoring,
            normalise=normalise,
        )


def grouped_routing(
    settings: Settings, layer: int, sizes: MixtureShape, *, scoring: Scoring, selection_bias: str | None
) -> Routing:
    """Routing by groups, as DeepSeek's family describes it; `scoring` where the file does not say.

    Raises:
        CheckpointError: groups that cannot be equal, or too few experts in those that are used.
    """
    kind = settings.optional_count("expert_gating_func") if settings.is_gguf else None
    groups, used = settings.optional_count("n_group") or 1, settings.optional_count("topk_group") or 1
    if sizes.num_experts % groups or not used <= groups or used * (sizes.num_experts // groups) < sizes.num_used:
        raise CheckpointError(
            f"{settings.path}: {sizes.num_experts} experts in {groups} groups, of which {used} are used, "
            f"cannot give {sizes.num_used}",
            path=str(settings.path),
        )
    plain = sizes.routing(
        layer,
        scoring=scoring if kind is None else _gating(settings, kind),
        normalise=settings.flag("norm_topk_prob", False),
    )
    return replace(
        plain,
        selection_bias=selection_bias,
        num_groups=groups,
        groups_used=used,
        scale=settings.optional_number("routed_scaling_factor") or 1.0,
    )


def _gating(settings: Settings, kind: int) -> Scoring:
    if kind not in _GATING:
        raise UnsupportedError(f"{settings.path}: expert_gating_func {kind} is not supported")
    return _GATING[kind]


def sliding_windows(
    settings: Settings, num_layers: int, window: int | None, is_sliding: Sequence[bool]
) -> tuple[int | None, ...]:
    """The attention window of every layer: by the config's `layer_types` where it has them, else by `is_sliding`."""
    kinds = settings.sequence("layer_types", num_layers)
    if kinds is not None:
        unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
        if unknown:
            raise UnsupportedError(f"{settings.path}: layer_types has {quote(unknown[0])}, which is not supported")
        is_sliding = [kind == "sliding_attention" for kind in kinds]
    return tuple(window if sliding else None for sliding in is_sliding)


def pattern(settings: Settings, num_layers: int, period: int) -> list[bool]:
    """Which layers are windowed when each `period`-th is not. The file may give the period, or a flag for every layer."""
    key = "attention.sliding_window_pattern" if settings.is_gguf else "sliding_window_pattern"
    value = settings.values.get(settings.name(key))
    if isinstance(value, Sequence):
        return [bool(flag) for flag in settings.sequence(key, num_layers) or ()]
    period = settings.count(key, period)
    return [(layer + 1) % period != 0 for layer in range(num_layers)]


def is_sparse(settings: Settings, layer: int) -> bool:
    """Whether a layer of Qwen's has experts: a config.json may leave some out."""
    if settings.is_gguf:
        return True
    dense = settings.get("mlp_only_layers")
    is_dense = isinstance(dense, Sequence) and not isinstance(dense, str) and layer in dense
    return not is_dense and (layer + 1) % settings.count("decoder_sparse_step") == 0


def upper_windows(settings: Settings, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's windows: off by default, and then only from layer `max_window_layers` up. GGUF has none."""
    if settings.is_gguf or not settings.flag("use_sliding_window", False):
        return (None,) * num_layers
    lowest = settings.count("max_window_layers") if settings.get("max_window_layers") else 0
    is_sliding = [layer >= lowest for layer in range(num_layers)]
    return sliding_windows(settings, num_layers, settings.optional_count("sliding_window"), is_sliding)
