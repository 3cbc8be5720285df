"""The options that commands share, in llama.cpp's names, with their environment variables.

An option on the command line beats its variable. What is not given is left out, so that `offload.config` alone holds the
defaults. Knows nothing of what the values do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

import typer

from offload.cli.text import check_text, read_text_file, user_path
from offload.errors import UsageError

_DEBUG: Final = "offload.debug"
_SAMPLING: Final = "Sampling"
_ANSWER: Final = "Answer"


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[_DEBUG] = value
    return value


def debug_requested(ctx: Any) -> bool:
    """Whether `--debug` was given to the command that runs under `ctx`."""
    return bool(ctx.meta.get(_DEBUG, False))


def was_typed(ctx: typer.Context, name: str) -> bool:
    """Whether the parameter `name` stood on the command line, and is neither its default nor from its variable."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


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
