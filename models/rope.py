"""Rotary position settings of a checkpoint: plain, linear, llama 3, longrope and YaRN scaling.

All scalings come down to a divisor for every frequency and a factor on the result, which is what `Rope` holds.
"""

from __future__ import annotations

from math import ceil, floor, log, pi, sqrt

from offload.errors import CheckpointError, UnsupportedError
from offload.kernels.ops import Rope
from offload.models.assembly import Assembly
from offload.models.hyperparameters import Settings

_FACTORS = "rope_freqs.weight"


def rope_of(
    settings: Settings, parts: Assembly, ctx: int, *, interleaved: bool = False, partial: bool = False,
    dims: int | None = None, mscale: bool = False,
) -> Rope:  # fmt: skip
    """The rotation of all layers of a model that has only one.

    Args:
        ctx: context length that the model will be run with; longrope chooses its factors by it.
        interleaved: the pairing of rotated features in GGUF files; Hugging Face's files always pair halves.
        partial: the family may rotate only the leading part of each head.
        dims: features that are rotated, where a config.json tells it in the family's own way.
        mscale: the family scales scores in stretched contexts itself, so the rotation does not.

    Raises:
        UnsupportedError: a scaling that is not implemented.
        CheckpointError: parameters of the scaling are missing or senseless.
    """
    if settings.is_gguf:
        return gguf_rope(settings, parts, ctx, interleaved=interleaved, mscale=mscale)
    return huggingface_rope(settings, rope_section(settings), parts, ctx, partial=partial, dims=dims)


def gguf_rope(
    settings: Settings, parts: Assembly, ctx: int, *, interleaved: bool = False, mscale: bool = False
) -> Rope:
    """The rotation that a GGUF file describes. See `rope_of`."""
    dims = _rotated(settings, parts, settings.count("rope.dimension_count", parts.shape.head_dim))
    theta = settings.number("rope.freq_base", 10_000.0)
    kind = settings.text("rope.scaling.type", "linear")
    factor = settings.optional_number("rope.scaling.factor") or settings.optional_number("rope.scale_linear") or 1.0
    original = settings.count("rope.scaling.original_context_length", parts.shape.context_length)
    magnitude = settings.number("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "longrope", "yarn"):
        raise UnsupportedError(f"{settings.path}: rope scaling {kind!r} is not supported")
    plain = Rope(dims=dims, theta=theta, interleaved=interleaved, magnitude=magnitude)
    if kind == "yarn":
        if settings.get("rope.scaling.yarn_log_multiplier") and not mscale:
            raise UnsupportedError(f"{settings.path}: yarn scaling with a log multiplier is not supported")
        grown = 1.0 if settings.get("rope.scaling.yarn_log_multiplier") else _growth(factor)
        return _yarn(plain, parts, settings, factor, original, magnitude * grown)
    stored = "rope_factors_long.weight" if ctx > original else "rope_factors_short.weight"
    stored = _FACTORS if _FACTORS in parts else stored
    return Rope(
        dims=dims,
        theta=theta,
        interleaved=interleaved,
        frequency_scale=1.0 if kind == "none" else 1.0 / factor,
        factors=parts.vector(stored, dims // 2) if stored in parts else None,
        magnitude=magnitude,
    )


def rope_section(settings: Settings, kind: str | None = None, *, only: bool = False) -> Settings:
    """Rope parameters of a config.json: `rope_parameters`, or the older `rope_scaling`.

    Args:
        kind: layers that may have a section of their own, such as "full_attention".
        only: parameters that are not in a section of their own do not apply to these layers.
    """
    for key in ("rope_parameters", "rope_scaling"):
        section = settings.section(key)
        if section is None:
            continue
        own = None if kind is None else section.section(kind)
        if own is not None or not only:
            return own or section
    return Settings(settings.path, {})


def huggingface_rope(
    settings: Settings,
    section: Settings,
    parts: Assembly,
    ctx: int,
    *,
    theta: float | None = None,
    partial: bool = False,
    dims: int | None = None,
    name: str = _FACTORS,
) -> Rope:
    """The rotation that a section of a config.json describes. See `rope_of`.

    Args:
        theta: base where the section has none; by default the config's `rope_theta`, or 10000.
        name: what the vector of divisors will be called.
    """
    theta = section.number("rope_theta", settings.number("rope_theta", 10_000.0) if theta is None else theta)
    share = section.number("partial_rotary_factor", settings.number("partial_rotary_factor", 1.0))
    if share != 1.0 and not partial:
        raise UnsupportedError(f"{settings.path}: partial_rotary_factor is {share}; only 1 is supported here")
    plain = Rope(dims=_rotated(settings, parts, dims or int(parts.shape.head_dim * share)), theta=theta)
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "default" or (kind == "dynamic" and ctx <= parts.shape.context_length):
        return plain  # dynamic scaling only changes what lies beyond the trained context
    if kind == "linear":
        return Rope(dims=plain.dims, theta=theta, frequency_scale=1.0 / section.number("factor"))
    stated = section.count("original_max_position_embeddings", parts.shape.context_length)
    original = settings.count("original_max_position_embeddings", stated)  # Phi 3 keeps it outside, and that one counts
    if kind == "llama3":
        return Rope(dims=plain.dims, theta=theta, factors=parts.constant(name, _llama3(plain, section, original)))
    if kind in ("longrope", "su"):
        return _longrope(plain, parts, section, ctx, original, name)
    if kind == "yarn":
        factor = section.number("factor")
        return _yarn(plain, parts, section, factor, original, _yarn_magnitude(section, factor), name)
    raise UnsupportedError(f"{settings.path}: rope scaling {kind!r} is not supported at a context of {ctx}")


def _rotated(settings: Settings, parts: Assembly, dims: int) -> int:
    if dims % 2 or not 0 < dims <= parts.shape.head_dim:
        raise CheckpointError(
            f"{settings.path}: {dims} rotated features in heads of {parts.shape.head_dim}; expected an even number of them",
            path=str(settings.path),
        )
    return dims


def _llama3(plain: Rope, section: Settings, original: int) -> tuple[float, ...]:
    """Divisors by wavelength: long waves are stretched, short ones kept, those between blended (Llama 3.1)."""
    factor = section.number("factor", 8.0)
    low, high = section.number("low_freq_factor", 1.0), section.number("high_freq_factor", 4.0)
    if low >= high:
        raise CheckpointError(
            f"{section.path}: low_freq_factor {low} must be below high_freq_factor {high}", path=str(section.path)
        )
    divisors = []
    for index in range(plain.dims // 2):
        wavelength = 2 * pi * plain.theta ** (2 * index / plain.dims)
        blend = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        divisors.append(1.0 / ((1.0 - blend) / factor + blend))
    return tuple(divisors)


def _longrope(plain: Rope, parts: Assembly, section: Settings, ctx: int, original: int, name: str) -> Rope:
    """Searched divisors, one set for short and one for long contexts (LongRoPE, arXiv 2402.13753)."""
    divisors = section.numbers("long_factor" if ctx > original else "short_factor")
    if len(divisors) != plain.dims // 2:
        raise CheckpointError(
            f"{section.path}: longrope has {len(divisors)} factors; {plain.dims // 2} are needed",
            path=str(section.path),
        )
    stretch = section.number("factor", parts.shape.context_length / original)
    magnitude = sqrt(1 + log(stretch) / log(original)) if stretch > 1 and original > 1 else 1.0
    return Rope(
        dims=plain.dims,
        theta=plain.theta,
        factors=parts.constant(name, divisors),
        magnitude=section.number("attention_factor", magnitude),
    )


def _yarn(
    plain: Rope,
    parts: Assembly,
    section: Settings,
    factor: float,
    original: int,
    magnitude: float,
    name: str = _FACTORS,
) -> Rope:
    """Fast rotations kept, slow ones stretched, a ramp between (YaRN, arXiv 2309.00071)."""
    if plain.theta <= 1:
        raise CheckpointError(
            f"{section.path}: rope base {plain.theta}; yarn needs one above 1", path=str(section.path)
        )
    prefix = "rope.scaling.yarn_" if section.is_gguf else ""
    fast, slow = section.number(f"{prefix}beta_fast", 32.0), section.number(f"{prefix}beta_slow", 1.0)

    def turning_index(rotations: float) -> float:
        return plain.dims * log(original / (rotations * 2 * pi)) / (2 * log(plain.theta))

    first, last = turning_index(fast), turning_index(slow)
    if section.is_gguf or section.flag("truncate", True):
        first, last = floor(first), ceil(last)
    low, high = max(0, first), min(plain.dims - 1, last)
    divisors = []
    for index in range(plain.dims // 2):
        stretched = min(1.0, max(0.0, (index - low) / max(0.001, high - low)))
        divisors.append(1.0 / (stretched / factor + 1.0 - stretched))
    return Rope(
        dims=plain.dims,
        theta=plain.theta,
        interleaved=plain.interleaved,
        factors=parts.constant(name, tuple(divisors)),
        magnitude=magnitude,
    )


def _growth(factor: float, rate: float = 1.0) -> float:
    """YaRN's factor on rotated vectors in a context stretched by `factor`."""
    return 0.1 * rate * log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_magnitude(section: Settings, factor: float) -> float:
    rate, of_scores = section.optional_number("mscale"), section.optional_number("mscale_all_dim")
    grown = _growth(factor, rate) / _growth(factor, of_scores) if rate and of_scores else _growth(factor)
    return section.number("attention_factor", grown)
