"""`offload run`: one prompt in, one text out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload.cli.grouping import grouped
from offload.cli.load_options import LoadOptions
from offload.cli.loading import open_engine
from offload.cli.options import AnswerOptions, DebugOption, JsonOption, ModelArgument, QuietOption, SamplingOptions
from offload.cli.progress import Bars, bars_wanted
from offload.cli.report import completion_json, completion_line
from offload.cli.streams import json_text
from offload.cli.text import check_text, printable, read_text, read_text_file
from offload.errors import UsageError
from offload.models.text.bounds import MAX_TEXT_BYTES

if TYPE_CHECKING:
    from offload.engine import Engine
    from offload.results import Completion

PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="The prompt. Left out: --file, else standard input.", show_default=False),
]
FileOption = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.", show_default=False)
]
ChatOption = Annotated[
    bool, typer.Option("--chat/--raw", help="Put the prompt into the model's chat template, or take it as it is.")
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="System message; implies --chat.", show_default=False)
]
StatsOption = Annotated[bool, typer.Option("--stats", help="Print speed and traffic on stderr afterwards.")]


@grouped
def run(
    load: LoadOptions,
    sampling: SamplingOptions,
    answer: AnswerOptions,
    model: ModelArgument = None,
    prompt: PromptOption = None,
    file: FileOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    as_json: JsonOption = False,
    stats: StatsOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Complete one prompt and print the text."""
    del debug
    request = make_prompt(read_prompt(prompt, file), chat=chat, system=system)
    options = {**sampling.given(), **answer.given()}
    with Bars(enabled=bars_wanted(quiet=quiet or as_json)) as bars, open_engine(model, load, bars) as engine:
        completion = complete(engine, request, options, bars, show=not as_json)
        bars.stop()
        if completion.finish_reason == "length" and not quiet and {"json_schema", "grammar"} & options.keys():
            typer.echo("offload: note: the answer was cut, so it does not match; raise --max-tokens or --ctx", err=True)
        if as_json:
            typer.echo(json_text(completion_json(completion)))
        if stats:
            typer.echo(completion_line(completion), err=True)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the one place that was named, else from standard input.

    Raises:
        UsageError: two places were named, none was and standard input is a terminal, or the text is not UTF-8 or
            too large for any tokenizer.
    """
    if prompt is not None and file is not None:
        raise UsageError("--prompt and --file: give one of the two")
    if prompt is not None:
        return check_text("--prompt", prompt)
    place = f"the prompt from {file or 'standard input'}"
    try:
        if file is not None:
            return read_text_file(file, MAX_TEXT_BYTES, place)
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt: give -p TEXT or -f FILE, or pipe one into standard input")
        # `echo` and heredocs add a line feed
        return read_text(sys.stdin.buffer, MAX_TEXT_BYTES, place).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{place} is not UTF-8 text ({error})") from error
    except OSError as error:
        raise UsageError(f"{place}: {error.strerror}") from error


def make_prompt(text: str, *, chat: bool, system: str | None) -> str | list[dict[str, str]]:
    """The text as it is, or as the messages of a chat.

    Raises:
        UsageError: the system message is not UTF-8.
    """
    if system is not None:
        return [{"role": "system", "content": check_text("--system", system)}, {"role": "user", "content": text}]
    return [{"role": "user", "content": text}] if chat else text


def complete(
    engine: Engine, prompt: str | list[dict[str, str]], options: dict[str, Any], bars: Bars, *, show: bool
) -> Completion:
    """Stream the answer, writing the text to stdout as it comes when `show`."""
    clean = printable if sys.stdout.isatty() else str
    with engine.stream(prompt, **options, on_prefill=bars.prefill) as stream:
        for chunk in stream:
            if chunk.text and show:
                bars.stop()
                sys.stdout.write(clean(chunk.text))
                sys.stdout.flush()
        completion = stream.result()
    if show:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return completion
