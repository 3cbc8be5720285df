"""The options that commands share, in llama.cpp's names, with their environment variables.

An option on the command line beats its variable. What is not given is left out, so that `offload.config` alone holds the
defaults. Knows nothing of what the values do.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

import typer

from offload.cli.text import check_text, read_text_file, user_path
from offload.errors import UsageError
from offload.trace import check_trace_place

_DEBUG: Final = "offload.debug"
_MEMORY: Final = "Memory and device"
_SAMPLING: Final = "Sampling"
_ANSWER: Final = "Answer"


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[_DEBUG] = value
    return value


def _check_trace(path: Path | None) -> Path | None:
    """The trace is written at the end, by a rename; what would fail then is refused before the model is loaded."""
    if path is None:
        return None
    if not path.parent.is_dir():
        raise UsageError(f"--trace {path}: no such folder {path.parent}")
    if path.exists() and not path.is_file():
        raise UsageError(f"--trace {path}: it is not a regular file; name a file to write")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--trace {path}: the folder {path.parent} is not writable; choose another place")
    check_trace_place(path)
    return path


def debug_requested(ctx: Any) -> bool:
    """Whether `--debug` was given to the command that runs under `ctx`."""
    return bool(ctx.meta.get(_DEBUG, False))


def was_typed(ctx: typer.Context, name: str) -> bool:
    """Whether the parameter `name` stood on the command line, and is neither its default nor from its variable."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


class KVType(str, Enum):
    """Element types of the KV cache."""

    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class AutoChoice(str, Enum):
    """Whether something is done: while it pays, always, never."""

    auto = "auto"
    on = "on"
    off = "off"


def _memory(
    *names: str, about: str, env: str | None = None, low: float | None = None, high: float | None = None
) -> Any:
    return typer.Option(*names, help=about, envvar=env, show_default=False, rich_help_panel=_MEMORY, min=low, max=high)


def _sampling(*names: str, about: str, default: object) -> Any:
    return typer.Option(*names, help=f"{about} Default: {default}.", show_default=False, rich_help_panel=_SAMPLING)


def _answer(*names: str, about: str) -> Any:
    return typer.Option(*names, help=about, show_default=False, rich_help_panel=_ANSWER)


ModelArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help="A .gguf file or a Hugging Face folder. Left out: the demo model.",
        envvar="OFFLOAD_MODEL",
        show_default=False,
    ),
]
ExpertModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A .gguf file or a Hugging Face folder of a model with experts.",
        envvar="OFFLOAD_MODEL",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug, envvar="OFFLOAD_DEBUG"),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bars and no notes on stderr.", envvar="OFFLOAD_QUIET")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Where the model may lie: the arguments that planning and loading share."""

    ram: Annotated[
        str | None,
        _memory(
            "--ram",
            about="Memory for the whole process, such as 6GiB, 3000M or minimum. Default: what is free.",
            env="OFFLOAD_RAM",
        ),
    ] = None
    vram: Annotated[str | None, _memory("--vram", about="Memory on the device.", env="OFFLOAD_VRAM")] = None
    ctx: Annotated[
        int | None,
        _memory(
            "--ctx",
            "--ctx-size",
            "-c",
            about="Context length in tokens. Default: the model's, at most 4096.",
            env="OFFLOAD_CTX",
        ),
    ] = None
    device: Annotated[
        str,
        _memory(
            "--device",
            about="auto, cpu, cuda:0 or torch:cpu. Default: auto, a CUDA card where one can be used, else the CPU.",
            env="OFFLOAD_DEVICE",
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        _memory("--threads", "-t", about="Compute threads. Default: as many as cores.", env="OFFLOAD_THREADS"),
    ] = None
    kv_type: Annotated[
        KVType,
        _memory(
            "--kv-type",
            about="Element type of the KV cache: f16, bf16, f32, or on the CPU q8_0 or q4_0. Default: f16.",
            env="OFFLOAD_KV_TYPE",
        ),
    ] = KVType.f16
    kv_type_k: Annotated[
        KVType | None,
        _memory(
            "--kv-type-k",
            "--cache-type-k",
            "-ctk",
            about="Element type of keys alone. Default: --kv-type.",
            env="OFFLOAD_KV_TYPE_K",
        ),
    ] = None
    kv_type_v: Annotated[
        KVType | None,
        _memory(
            "--kv-type-v",
            "--cache-type-v",
            "-ctv",
            about="Element type of values alone. Default: --kv-type.",
            env="OFFLOAD_KV_TYPE_V",
        ),
    ] = None

    kv_ram: Annotated[
        str | None,
        _memory(
            "--kv-ram",
            about="Memory for the KV cache; what is more lies on disk. Default: all of it, where --ram allows that.",
            env="OFFLOAD_KV_RAM",
        ),
    ] = None
    kv_dir: Annotated[
        Path | None,
        _memory("--kv-dir", about="Folder for what lies on disk. Default: the cache folder.", env="OFFLOAD_KV_DIR"),
    ] = None
    host_compute: Annotated[
        AutoChoice,
        _memory(
            "--host-compute",
            about="Have the CPU compute, beside a device, what lies in host memory: weights, experts, attention over a KV "
            "cache that the device has no room for. Default: auto, while it pays.",
            env="OFFLOAD_HOST_COMPUTE",
        ),
    ] = AutoChoice.auto

    def planning(self) -> dict[str, Any]:
        """The options by the names of `offload.load`'s arguments."""
        return {
            "ram": self.ram,
            "vram": self.vram,
            "ctx": self.ctx,
            "device": self.device,
            "threads": self.threads,
            "kv_type": self.kv_type.value,
            "kv_type_k": None if self.kv_type_k is None else self.kv_type_k.value,
            "kv_type_v": None if self.kv_type_v is None else self.kv_type_v.value,
            "kv_ram": self.kv_ram,
            "kv_dir": None if self.kv_dir is None else user_path(self.kv_dir),
            "host_compute": self.host_compute.value,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(PlanOptions):
    """How to open the model: the arguments of `offload.load`."""

    expert_policy: Annotated[
        str,
        _memory(
            "--expert-policy",
            about="Which expert makes room for another: auto, lru, lfu, lrfu-4, lrfu-16, lrfu-64, shallow, density, "
            "one-bit or regret. Default: auto, what a trace showed to be best, or lrfu-64.",
            env="OFFLOAD_EXPERT_POLICY",
        ),
    ] = "auto"
    prefetch: Annotated[
        AutoChoice,
        _memory(
            "--prefetch", about="Read experts ahead of need. Default: auto, while it pays.", env="OFFLOAD_PREFETCH"
        ),
    ] = AutoChoice.auto
    skip_experts_below: Annotated[
        float,
        _memory(
            "--skip-experts-below",
            about="Leave out experts with a smaller share of the router's weights. Costs quality.",
            env="OFFLOAD_SKIP_EXPERTS_BELOW",
            low=0,
            high=1,
        ),
    ] = 0.0
    expert_pack: Annotated[
        Path | None, _memory("--expert-pack", about="A side file of `offload pack`.", env="OFFLOAD_EXPERT_PACK")
    ] = None
    coarse_experts_below: Annotated[
        float,
        _memory(
            "--coarse-experts-below",
            about="Read missing experts with a smaller share of the router's weights by half. Costs quality.",
            env="OFFLOAD_COARSE_EXPERTS_BELOW",
            low=0,
            high=1,
        ),
    ] = 0.0
    workers: Annotated[
        int | None,
        _memory(
            "--workers",
            about="Disk requests in flight. Default: what suits the model.",
            env="OFFLOAD_WORKERS",
            low=1,
            high=512,
        ),
    ] = None
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            help="Write a timeline of compute, waits and reads (Chrome or Perfetto).",
            envvar="OFFLOAD_TRACE",
            show_default=False,
            rich_help_panel=_MEMORY,
            callback=_check_trace,
        ),
    ] = None

    def loading(self) -> dict[str, Any]:
        """All options by the names of `offload.load`'s arguments."""
        return {
            **self.planning(),
            "expert_policy": self.expert_policy,
            "prefetch": self.prefetch.value,
            "skip_experts_below": self.skip_experts_below,
            "expert_pack": None if self.expert_pack is None else user_path(self.expert_pack),
            "coarse_experts_below": self.coarse_experts_below,
            "workers": self.workers,
            "trace": self.trace is not None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen: fields of `offload.config.SamplingConfig` under llama.cpp's names."""

    temperature: Annotated[
        float | None, _sampling("--temperature", "--temp", about="0 is greedy and exact.", default=0.8)
    ] = None
    top_k: Annotated[int | None, _sampling("--top-k", about="Most probable tokens kept; 0: all.", default=40)] = None
    top_p: Annotated[float | None, _sampling("--top-p", about="Probability mass kept.", default=0.95)] = None
    min_p: Annotated[float | None, _sampling("--min-p", about="Least share of the best token's.", default=0.05)] = None
    typical_p: Annotated[
        float | None, _sampling("--typical-p", "--typical", about="Locally typical mass; 1: off.", default=1.0)
    ] = None
    top_n_sigma: Annotated[
        float | None, _sampling("--top-n-sigma", "--top-nsigma", about="Deviations kept; -1: off.", default=-1)
    ] = None
    repeat_penalty: Annotated[float | None, _sampling("--repeat-penalty", about="1: off.", default=1.0)] = None
    repeat_last_n: Annotated[
        int | None, _sampling("--repeat-last-n", about="Tokens that penalties look back.", default=64)
    ] = None
    presence_penalty: Annotated[float | None, _sampling("--presence-penalty", about="0: off.", default=0.0)] = None
    frequency_penalty: Annotated[float | None, _sampling("--frequency-penalty", about="0: off.", default=0.0)] = None
    dry_multiplier: Annotated[float | None, _sampling("--dry-multiplier", about="0: off.", default=0.0)] = None
    dry_base: Annotated[float | None, _sampling("--dry-base", about="Growth of the DRY penalty.", default=1.75)] = None
    dry_allowed_length: Annotated[
        int | None, _sampling("--dry-allowed-length", about="Repeats that DRY lets pass.", default=2)
    ] = None
    dry_penalty_last_n: Annotated[
        int | None, _sampling("--dry-penalty-last-n", about="Tokens that DRY looks back; -1: all.", default=-1)
    ] = None
    xtc_probability: Annotated[float | None, _sampling("--xtc-probability", about="0: off.", default=0.0)] = None
    xtc_threshold: Annotated[float | None, _sampling("--xtc-threshold", about="XTC's threshold.", default=0.1)] = None
    mirostat: Annotated[int | None, _sampling("--mirostat", about="0: off, 1 or 2: version.", default=0)] = None
    mirostat_tau: Annotated[
        float | None, _sampling("--mirostat-tau", "--mirostat-ent", about="Target entropy.", default=5.0)
    ] = None
    mirostat_eta: Annotated[
        float | None, _sampling("--mirostat-eta", "--mirostat-lr", about="Learning rate.", default=0.1)
    ] = None
    seed: Annotated[int | None, _sampling("--seed", "-s", about="Same seed, same text.", default="random")] = None

    def given(self) -> dict[str, Any]:
        """The options that were given, by the names of `SamplingConfig`."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How long the answer may be, when it stops, and what it must match: fields of `GenerationConfig`."""

    max_tokens: Annotated[
        int | None,
        _answer("--max-tokens", "--predict", "-n", about="Most tokens to generate. Default: fill the context."),
    ] = None
    stop: Annotated[list[str] | None, _answer("--stop", about="A string that ends the answer. May be repeated.")] = None
    json_schema: Annotated[
        str | None, _answer("--json-schema", about="JSON schema that the answer must satisfy, or @FILE.")
    ] = None
    grammar: Annotated[
        str | None, _answer("--grammar", about="Lark or GBNF grammar that the answer must match, or @FILE.")
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were given, by the names of `GenerationConfig`; `@FILE` replaced by the file's text."""
        values: dict[str, Any] = {"max_tokens": self.max_tokens, "stop": None}
        if self.stop:
            values["stop"] = tuple(check_text("--stop", text) for text in self.stop)
        for name in ("json_schema", "grammar"):
            values[name] = text_or_file(f"--{name.replace('_', '-')}", getattr(self, name))
        _check_json("--json-schema", values["json_schema"])
        return {name: value for name, value in values.items() if value is not None}


def _check_json(label: str, text: str | None) -> None:
    """
    Raises:
        UsageError: not JSON.
    """
    try:
        json.loads("{}" if text is None else text)
    except (ValueError, RecursionError) as error:
        hint = f"; to read a file, give {label} @FILE" if text is not None and "{" not in text else ""
        raise UsageError(f"{label}: not valid JSON ({error}){hint}") from None


def text_or_file(label: str, value: str | None) -> str | None:
    """`value`, or the text of FILE when it is `@FILE`.

    Raises:
        UsageError: `value` or the file is not UTF-8 text, or the file is too large; the message starts with `label`.
    """
    if value is None or not value.startswith("@"):
        return None if value is None else check_text(label, value)
    from offload.constraint import MAX_SOURCE_BYTES  # with numpy, which a help text need not wait for

    try:
        return read_text_file(user_path(value[1:]), MAX_SOURCE_BYTES, f"{label} {value}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{label} {value}: cannot read it as UTF-8 text ({error})") from error


def flag_names() -> dict[str, str]:
    """The fields of `SamplingOptions` and `AnswerOptions` by the names of their flags, dashes as underscores."""
    names: dict[str, str] = {}
    for group in (SamplingOptions, AnswerOptions):
        for name, hint in get_type_hints(group, include_extras=True).items():
            for flag in hint.__metadata__[0].param_decls:
                names[flag.lstrip("-").replace("-", "_")] = name
    return names
