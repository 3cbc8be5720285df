"""Text on its way to a terminal, which obeys some of the bytes that a model can emit, and text and paths from a user."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import BinaryIO, Final

from rich.console import Console

from offload.errors import UsageError
from offload.units import format_size

_UNWATCHED_WIDTH: Final = 10_000  # of what no terminal shows: wide enough that nothing is cut
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without C0 controls (line feed and tab stay), DEL and C1: no escape sequence survives, nor a lone surrogate."""
    return _CONTROL.sub("", text)


def check_text(label: str, text: str) -> str:
    """`text`, when all of it is text: Python smuggles in what is not UTF-8, and a tokenizer would read `?` for each byte.

    Raises:
        UsageError: it holds a lone surrogate; the message starts with `label`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{label}: it is not UTF-8 text (at character {error.start + 1})") from None
    return text


def read_text(file: BinaryIO, limit: int, label: str) -> str:
    """The UTF-8 text of `file`. Never more than one byte beyond `limit` is read, since a pipe or a device may have no end.

    Raises:
        UsageError: it is larger; the message starts with `label`. UnicodeDecodeError: not UTF-8. OSError: unreadable.
    """
    data = file.read(limit + 1)
    if len(data) > limit:
        raise UsageError(f"{label}: more than {format_size(limit)}, which is the most that is read; shorten it")
    return data.decode("utf-8")


def read_text_file(path: Path, limit: int, label: str) -> str:
    """`read_text` of the file at `path`, with every line end as a line feed."""
    with path.open("rb") as file:
        return read_text(file, limit, label).replace("\r\n", "\n").replace("\r", "\n")


def user_path(name: str | Path) -> Path:
    """The path that a user typed, `~` expanded.

    Raises:
        UsageError: nobody of that name has a home here, or no path can hold these characters.
    """
    if "\0" in str(name):
        raise UsageError(f"path {str(name)!r}: it holds a NUL character")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"path {str(name)!r}: there is no such user; give the folder's full path") from None


def output_console() -> Console:
    """Standard output for tables: as wide as the terminal, and without an end where there is none."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _UNWATCHED_WIDTH)
