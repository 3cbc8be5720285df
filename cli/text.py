"""What may be written to a terminal. A model can emit any byte, and a terminal obeys some of them."""

from __future__ import annotations

import re
import sys
from typing import Final

from rich.console import Console

_UNWATCHED_WIDTH: Final = 10_000  # of what no terminal shows: wide enough that nothing is cut
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` without C0 controls (line feed and tab stay), DEL and C1: no escape sequence survives."""
    return _CONTROL.sub("", text)


def output_console() -> Console:
    """Standard output for tables: as wide as the terminal, and without an end where there is none."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _UNWATCHED_WIDTH)
