"""Every knob, with its unit and its meaning. Values are checked here, once, and never patched afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Final, Literal, get_args

from offload.elements import KVTypes, kv_types
from offload.errors import UsageError
from offload.units import KIB, MIB, parse_size

KVType = Literal["f16", "bf16", "f32", "q8_0", "q4_0"]
Prefetch = Literal["auto", "on", "off"]
HostCompute = Literal["auto", "on", "off"]
MINIMUM: Final = "minimum"
MAX_THREADS: Final = 512  # ggml's own limit

LEAST_TEMPERATURE: Final = 1e-6
"""Below, sampling is greedy: there float32 hardly tells logits apart, and over a far smaller one they become infinite."""
MAX_BIAS: Final = 1e20
"""More than any logit; over the least penalty and the least temperature together it is still finite in float32."""
MAX_BREAKERS: Final = 100  # llama.cpp compares each with the whole vocabulary before the first token

MICRO_BATCH_TOKENS: Final = 256
"""Tokens that one graph computes in prefill. Fixed, never a function of the budget: the partition of a prompt decides which
matrix kernels run, so a partition that followed the budget would make the last bits of the logits follow it too. On an 8B
model 512 computes no faster (61 to 63 tokens/s, against 61 to 65) in twice the workspace, and 128 is a tenth slower."""

FEW_TOKENS: Final = 32
"""A pass of at most so many tokens runs in the workspace that is always there; longer ones use the prompts' own."""

KV_BUCKET: Final = 256
"""KV lengths are rounded up to this, as llama.cpp does: graphs stay cached for 256 tokens, and masked keys add nothing. The
cache's memory comes into use in the same steps."""

PART_BYTES: Final = 8 * MIB  # a matrix moves in parts of at most this size, lest it set the ring's
READ_BYTES: Final = PART_BYTES + 64 * KIB
"""One disk request: a part with the rest of its pages. 2 to 8 MiB measured alike, larger ones delay cancellation."""
READ_WORKERS: Final = 2
"""Requests in flight. More share the bandwidth, so that all their blocks arrive late and at once: on a small
ring the disk then idles a tenth of the time, with two not at all. One leaves a gap between requests: 5% less bandwidth."""
EXPERT_READ_WORKERS: Final = 6
"""The same for models with experts, whose requests are smaller: 0.9 MB at a time came at 2.6 GB/s one by one, at 3.1 by two,
at 3.5 by six, and no faster by more."""
GUESSED_EXPERTS: Final = 6  # of the next layer, read ahead while the disk idles
RESERVED_SLOTS: Final = 8  # that guesses are read into, at most a quarter of a bank
HEAD_PART_BYTES: Final = 64 * MIB  # the output matrix is computed in parts of at most this size


def _check_number(name: str, value: object, low: float, high: float, *, whole: bool) -> None:
    """
    Raises:
        UsageError: not a number (not a whole one), or out of bounds. NaN is out of bounds.
    """
    number = None if isinstance(value, bool) else value
    if not isinstance(number, Real) or (whole and not isinstance(number, Integral)):
        raise UsageError(f"{name}={value!r}: must be a {'whole ' if whole else ''}number")
    try:
        size = float(number)
    except OverflowError:  # a whole number that is too large for a float, and perhaps to be printed
        raise UsageError(f"{name}: must lie between {low} and {high}") from None
    if not low <= size <= high:
        raise UsageError(f"{name}={value}: must lie between {low} and {high}")


def _check_bias(bias: object) -> None:
    """
    Raises:
        UsageError: not numbers by token id, or out of bounds. Which tokens there are is the sampler's business.
    """
    if not isinstance(bias, Mapping):
        raise UsageError("logit_bias: give a number for each token id, such as {42: -1.5}; -inf excludes a token")
    for token, value in bias.items():
        _check_number("logit_bias, a token", token, 0, 2**31 - 1, whole=True)
        if value != -math.inf:
            _check_number(f"logit_bias of token {token}", value, -MAX_BIAS, MAX_BIAS, whole=False)


def _check_breakers(breakers: tuple[str, ...]) -> None:
    """
    Raises:
        UsageError: not strings of text, or too many.
    """
    if not all(isinstance(text, str) for text in breakers):
        raise UsageError(f"dry_sequence_breakers={breakers!r}: give strings")
    if len(breakers) > MAX_BREAKERS:
        raise UsageError(f"dry_sequence_breakers: {len(breakers)} strings, at most {MAX_BREAKERS} allowed")
    try:
        "".join(breakers).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"dry_sequence_breakers: not UTF-8 text ({error})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """How to open a model.

    Attributes:
        ram: bytes that the whole process may use; None takes what the machine has free less a margin; "minimum" takes the
            least that works.
        vram: bytes that may be used on the device; None leaves it to the plan. Meaningless on the CPU.
        ctx: context length in tokens; None takes the model's own, at most 4096.
        device: "auto", "cpu" (ggml), or a torch device such as "cuda:0" or "torch:cpu".
        threads: compute threads; None takes the physical cores that this process may use.
        kv_type: element type of the KV cache. kv_type_k, kv_type_v: of its keys and of its values alone, where that is
            another. Quantized ones need the CPU's kernels. Models with latent attention keep no values.
        kv_ram: bytes of memory that it may take; what is more lies on disk. None: all of it, where the budget allows that.
        kv_dir: folder for what lies on disk; None takes the user's cache folder.
        workers: reader threads of the NVMe tier; None takes `READ_WORKERS`, or `EXPERT_READ_WORKERS`.
        expert_policy: which expert makes room for another, by the names of `prefetch.policies`; "auto" takes what `offload
            tune` or a replay found best for this model, else the default.
        prefetch: whether experts are read ahead of need: "on", "off", or "auto" for as long as a trial shows that it pays.
        host_compute: whether the CPU computes, beside a device, what lies in host memory: "on", "off", or "auto" for as long
            as a trial shows that it pays. Tokens agree to rounding. Where keys and values of some layers lie in host memory,
            which the plan decides, their attention is computed there; with "off" all are on the device.
        skip_experts_below: leaves out experts whose share of a token's router weights is smaller, between 0 and 1. Changes
            what is computed, the same at every budget; 0, the default, changes nothing.
        expert_pack: a side file of `offload pack`. coarse_experts_below: from it, experts that a decoded token gives a
            smaller share of its router weights are read with half of their bits, when memory does not hold them. Changes
            what is computed, and depends on what memory holds; 0 changes nothing.
        trace: record a timeline for `--trace`.
    """

    ram: int | Literal["minimum"] | None = None
    vram: int | None = None
    ctx: int | None = None
    device: str = "auto"
    threads: int | None = None
    kv_type: KVType = "f16"
    kv_type_k: KVType | None = None
    kv_type_v: KVType | None = None
    kv_ram: int | None = None
    kv_dir: Path | None = None
    workers: int | None = None
    expert_policy: str = "auto"
    prefetch: Prefetch = "auto"
    host_compute: HostCompute = "auto"
    skip_experts_below: float = 0.0
    expert_pack: Path | None = None
    coarse_experts_below: float = 0.0
    trace: bool = False

    def __post_init__(self) -> None:
        for name, value, most in (
            ("ctx", self.ctx, 2**31 - 1),
            ("threads", self.threads, MAX_THREADS),
            ("workers", self.workers, MAX_THREADS),
        ):
            if value is not None:
                _check_number(name, value, 1, most, whole=True)
        for name, kind in (("kv_type", self.kv_type), ("kv_type_k", self.kv_type_k), ("kv_type_v", self.kv_type_v)):
            if kind not in get_args(KVType) and (kind is not None or name == "kv_type"):
                raise UsageError(
                    f"{name}={kind!r}: choose {', '.join(get_args(KVType)[:-1])} or {get_args(KVType)[-1]}"
                )
        _check_number("skip_experts_below", self.skip_experts_below, 0.0, 1.0, whole=False)
        _check_number("coarse_experts_below", self.coarse_experts_below, 0.0, 1.0, whole=False)
        if self.coarse_experts_below and self.expert_pack is None:
            raise UsageError(
                "coarse experts are read from a side file: write one with `offload pack`, and name it by expert_pack "
                "(--expert-pack)"
            )
        for name, way in (("prefetch", self.prefetch), ("host_compute", self.host_compute)):
            if way not in ("auto", "on", "off"):
                raise UsageError(f"{name}={way!r}: choose auto, on or off")

    @property
    def kv_types(self) -> KVTypes:
        """How keys and values are stored."""
        return kv_types(self.kv_type_k or self.kv_type, self.kv_type_v or self.kv_type)

    @staticmethod
    def parse_ram(ram: str | int | None) -> int | Literal["minimum"] | None:
        """`"3GiB"`, bytes, `"minimum"` or None as the field `ram` wants it.

        Raises:
            UsageError: not a size.
        """
        if ram is None:
            return None
        return "minimum" if ram == MINIMUM else parse_size(ram)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. Names, order and defaults are llama.cpp's; temperature 0 is greedy and exact.

    A temperature below `LEAST_TEMPERATURE` counts as 0.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounds = (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("typical_p", self.typical_p, 0.0, 1.0),
            ("xtc_probability", self.xtc_probability, 0.0, 1.0),
            ("xtc_threshold", self.xtc_threshold, 0.0, 1.0),
            ("mirostat", self.mirostat, 0, 2),
            ("seed", 0 if self.seed is None else self.seed, 0, 2**32 - 2),  # llama.cpp reads 2**32 - 1 as "choose one"
            ("repeat_penalty", self.repeat_penalty, 1e-3, 1e3),
            ("presence_penalty", self.presence_penalty, -1e3, 1e3),
            ("frequency_penalty", self.frequency_penalty, -1e3, 1e3),
            ("top_k", self.top_k, -1, 2**31 - 1),
            ("repeat_last_n", self.repeat_last_n, -1, 2**31 - 1),
            ("dry_penalty_last_n", self.dry_penalty_last_n, -1, 2**31 - 1),
            ("dry_allowed_length", self.dry_allowed_length, 0, 2**31 - 1),
            ("dry_multiplier", self.dry_multiplier, 0.0, 1e3),
            ("dry_base", self.dry_base, 0.0, 1e3),
            ("top_n_sigma", self.top_n_sigma, -1.0, 1e3),
            ("mirostat_tau", self.mirostat_tau, 0.0, 1e3),
            ("mirostat_eta", self.mirostat_eta, 0.0, 1e3),
        )
        for name, value, low, high in bounds:
            _check_number(name, value, low, high, whole=isinstance(low, int))
        _check_bias(self.logit_bias)
        _check_breakers(self.dry_sequence_breakers)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """One request: how much to generate, when to stop, what the text must match.

    Attributes:
        max_tokens: most tokens to generate; None fills the context.
        stop: strings that end the answer; they are not part of it, also when they span token borders.
        logprobs: number of alternatives to report beside each chosen token; None reports none.
        json_schema: JSON schema (as text) that the answer must satisfy; `"{}"` is any JSON.
        grammar: grammar in Lark or GBNF notation that the answer must satisfy.
        ignore_eos: go on after the model's own end of text (for benchmarks).
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    json_schema: str | None = None
    grammar: str | None = None
    ignore_eos: bool = False
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for name, count, most in (("max_tokens", self.max_tokens, 2**31 - 1), ("logprobs", self.logprobs, 100)):
            if count is not None:
                _check_number(name, count, 0, most, whole=True)
        if self.json_schema is not None and self.grammar is not None:
            raise UsageError("json_schema and grammar: give one of the two")
        if not all(isinstance(text, str) for text in self.stop):
            raise UsageError(f"stop={self.stop!r}: give a string, or several")
        for name, text in (("json_schema", self.json_schema), ("grammar", self.grammar)):
            if not isinstance(text, str | None):
                raise UsageError(f"{name}: give it as text")
        if any(not text for text in self.stop):
            raise UsageError("stop: an empty stop string would end every answer at once")
