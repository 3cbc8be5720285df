"""What may be written to a terminal. A model can emit any byte, and a terminal obeys some of them."""

from __future__ import annotations

import re
from typing import Final

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` without C0 controls (line feed and tab stay), DEL and C1: no escape sequence survives."""
    return _CONTROL.sub("", text)
