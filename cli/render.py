"""An answer as it grows on the screen: whole lines scroll up, the unfinished line and the status stay live below them.

    PlainView   not a terminal: text as it comes, nothing else
    LiveView    a terminal: wrapped at words, control characters removed, a status line while the answer runs

Knows nothing of engines; the status is a string from its caller.
"""

from __future__ import annotations

import re
import time
from types import TracebackType
from typing import Final, Protocol, TextIO

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from offload.cli.text import printable

_REFRESH_S: Final = 0.05  # a faster model than this needs no faster screen
_WORD: Final = re.compile(r"\S+\s*|\s+")  # the space behind a word hangs over the edge, it never starts a line


class View(Protocol):
    """Where one answer goes. Used as a context manager around it."""

    def write(self, text: str) -> None: ...
    def status(self, line: str) -> None: ...
    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PlainView:
    """Text to a stream that is no terminal, unchanged, with a line feed at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def status(self, line: str) -> None:
        """Dropped: nobody watches."""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.write("\n")


class Wrapper:
    """Breaks a growing text into lines of at most `width` cells, at spaces where there are any.

    `feed` returns the lines that are final; `rest` is the one that may still grow.
    """

    def __init__(self, width: int) -> None:
        self._width = max(2, width)  # a wide character takes two cells
        self.rest = ""

    def feed(self, text: str) -> list[str]:
        """Final lines, without their line feeds, after appending `text`."""
        *whole, last = (self.rest + text).expandtabs(4).split("\n")
        done: list[str] = []
        for line in whole:
            done.extend(self._wrap(line))
        *full, self.rest = self._wrap(last)
        return done + full

    def _wrap(self, line: str) -> list[str]:
        lines, current = [], ""
        for word in _WORD.findall(line):
            if current and self._too_wide(current + word):
                lines.append(current.rstrip())
                current = ""
            current += word
            while self._too_wide(current):  # a word longer than the line
                cut = self._cut(current)
                lines.append(current[:cut])
                current = current[cut:]
        return [*lines, current]

    def _too_wide(self, text: str) -> bool:
        return cell_len(text.rstrip()) > self._width

    def _cut(self, text: str) -> int:
        cells = 0
        for index, character in enumerate(text):
            cells += cell_len(character)
            if cells > self._width:
                return max(1, index)
        return len(text)


class LiveView:
    """An answer on a terminal. `write` and `status` may be called from different threads."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._wrapper = Wrapper(console.width - 1)
        self._status = ""
        self._drawn_s = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def write(self, text: str) -> None:
        lines = self._wrapper.feed(printable(text))
        for line in lines:
            self._console.print(Text(line), soft_wrap=True)
        self._draw(now=bool(lines))

    def status(self, line: str) -> None:
        self._status = line
        self._draw(now=False)

    def _draw(self, *, now: bool) -> None:
        clock = time.monotonic()
        if not now and clock - self._drawn_s < _REFRESH_S:
            return
        self._drawn_s = clock
        status = Text(self._status, style="dim", no_wrap=True, overflow="ellipsis")
        rest = self._wrapper.rest.rstrip()
        self._live.update(Group(Text(rest), status) if rest else status, refresh=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        self._console.print(Text(self._wrapper.rest.rstrip()), soft_wrap=True)
