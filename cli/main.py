"""The `offload` program: its commands, its exit codes, and how an error reaches the user.

    0    done
    1    failed: one line on stderr, `offload: error: ...`, and a traceback only with --debug
    2    bad usage
    130  interrupted

A command's module is imported when that command runs, never to list it: `offload --help` and shell completion of the
command names load neither torch nor numpy.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

import offload
from offload.cli.options import debug_requested
from offload.cli.streams import open_streams
from offload.errors import OffloadError, StorageError, UsageError

COMMANDS: Final = {
    "chat": "Talk with a model. Without MODEL: with the demo model.",
    "run": "Complete one prompt and print the text.",
    "plan": "Show what would lie where in memory, and how fast it would run. Loads nothing.",
    "inspect": "Show what a model file holds. Loads nothing.",
    "doctor": "Measure this machine and say what is missing.",
    "trace": "Record what routers of a model with experts decide, and replay policies against it.",
    "tune": "Find what makes a model with experts fastest on this machine.",
    "pack": "Write a side file with coarse copies of a model's experts.",
    "bench": "Measure prefill and decode speed, and the share of the disk's limit that was reached.",
}
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130


class CommandGroup(TyperGroup):
    """Lists the commands from `COMMANDS`, imports the chosen one, and turns our errors into exit codes."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load_command(name), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer ends the program, quietly where a pipe was closed
        except KeyboardInterrupt as error:
            if sys.stdout.isatty():
                typer.echo()  # the shell's prompt does not go on where the text was cut
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except Exception as error:
            report(message_of(error), error if debug_requested(ctx) else None)
            raise typer.Exit(EXIT_USAGE if is_usage(error) else EXIT_FAILED) from error


def is_usage(error: Exception) -> bool:
    """Whether the user asked for what cannot be. typer's own exceptions carry their exit code."""
    return isinstance(error, UsageError) or getattr(error, "exit_code", EXIT_FAILED) == EXIT_USAGE


def message_of(error: Exception) -> str:
    """What to tell the user; what only a programmer can mend says so."""
    if hasattr(error, "format_message"):  # typer's
        message = error.format_message().rstrip(".").replace("Value error, ", "")  # how its parser begins its own
        return f"{message}{refused_value(error)}; --help lists what there is"
    if isinstance(error, OffloadError):
        return str(error) or type(error).__name__
    if isinstance(error, OSError):
        place = "standard output" if is_of_output(error) else error.filename
        reason = error.strerror or str(error) or type(error).__name__
        return reason if place is None else f"{place}: {reason}"
    return f"internal error, {type(error).__name__}: {error}; please report it with what --debug prints"


def refused_value(error: Exception) -> str:
    """The value that typer's `error` is about, where its message keeps it to itself."""
    details = getattr(error.__cause__ or error.__context__, "errors", None)
    values = [detail["input"] for detail in details() if "input" in detail] if callable(details) else []
    return "".join(f": {value!r}" for value in values[:1])


def is_of_output(error: OSError) -> bool:
    """Whether `error` is that of standard output: everything else that is written is named by its own error.

    What was refused is dropped, lest it be refused once more when the program ends.
    """
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return True
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def report(message: str, error: Exception | None) -> None:
    """Write `message` to stderr as one line, after the traceback of `error` when one is given."""
    if error is not None:
        traceback.print_exception(error)
    typer.echo(f"offload: error: {' '.join(message.split())}", err=True)


def load_command(name: str) -> Any:
    """Import `offload.cli.<name>` and make a command of its function `<name>`, or a group of its `app`."""
    module = import_module(f"offload.cli.{name}")
    if hasattr(module, "app"):
        group = typer.main.get_command(module.app)
        group.help = COMMANDS[name]
        return group
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, help=COMMANDS[name], no_args_is_help=False)(getattr(module, name))
    return typer.main.get_command(single)


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run language models that do not fit: weights streamed across VRAM, RAM and NVMe, exact at any budget.",
)


def _listed_only() -> None:
    """Stands in the listing for a command; `CommandGroup` replaces it before anything runs."""


for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(_listed_only)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"offload {offload.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version


def main() -> None:
    """Entry point of the `offload` script."""
    try:
        open_streams()
        app(prog_name="offload")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except (OSError, StorageError) as error:  # before any command, and of --help, --version, --install-completion
        report(message_of(error), None)
        sys.exit(EXIT_FAILED)
