"""The standard streams as the program needs them, whatever it was started with. Called once, before any command."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, Final

from offload.errors import StorageError

_LAST_STANDARD: Final = 2


def open_streams() -> None:
    """Take the place of standard streams that are closed, and print `?` for what the output's encoding cannot hold.

    Without standard error the program is silent there. A missing standard input stays `None` for those who would read it.

    Raises:
        StorageError: standard output is closed, so that nothing could be told.
    """
    _occupy_standard_descriptors()
    if sys.stderr is None:
        sys.stderr = os.fdopen(_LAST_STANDARD, "w", encoding="utf-8")
    if sys.stdout is None:
        raise StorageError("standard output is closed; redirect it to /dev/null if nobody reads it")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")


def _occupy_standard_descriptors() -> None:
    """Else the next file that is opened, a model or a trace, would be what libraries print to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD:
        pass
    os.close(descriptor)


def json_text(value: Any) -> str:
    """JSON in one line that can be printed on standard output: readable there in UTF-8, elsewhere with escapes."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()  # a lone surrogate has no UTF-8, but an escape
    except UnicodeEncodeError:
        return json.dumps(value)
    return text if _is_utf8(sys.stdout.encoding) else json.dumps(value)


def _is_utf8(encoding: str | None) -> bool:
    return (encoding or "").lower().replace("_", "-") in ("utf-8", "utf8")
