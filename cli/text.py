"""Text on its way to a terminal, which obeys some of the bytes that a model can emit, and paths that a user typed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from rich.console import Console

from offload.errors import UsageError

_UNWATCHED_WIDTH: Final = 10_000  # of what no terminal shows: wide enough that nothing is cut
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` without C0 controls (line feed and tab stay), DEL and C1: no escape sequence survives."""
    return _CONTROL.sub("", text)


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
