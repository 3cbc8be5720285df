"""A result file that is written anew after each line, so that a run that is cut off loses nothing of what it measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.results import table, write


@dataclass(slots=True)
class Part:
    """A table, or a text where it has no header."""

    header: Sequence[str]
    rows: list[Sequence[str]]

    def __str__(self) -> str:
        return table(self.header, self.rows) if self.header else "\n".join(cell for row in self.rows for cell in row)


@dataclass(slots=True)
class Growing:
    """The file `<date>_<name>.md` in `folder`. After `seconds` nothing new is begun, and the file says so."""

    name: str
    folder: Path
    seconds: float
    path: Path | None = None
    _parts: list[Part] = field(default_factory=list)
    _start_s: float = field(default_factory=time.monotonic)

    def begin(self, *header: str) -> None:
        """The lines from now on belong to a table of these columns, or to a text."""
        self._parts.append(Part(header, []))

    def add(self, *cells: str) -> None:
        """A line of the table or text."""
        line = [cell.replace("|", "/").replace("\n", " ") for cell in cells]
        self._parts[-1].rows.append(line)
        print(" | ".join(line), flush=True)
        self.path = write(self.name, "\n\n".join(str(part) for part in self._parts if part.rows), folder=self.folder)

    def measure(self, name: str, work: Callable[[], Sequence[str]]) -> None:
        """A line that begins with `name`: what `work` returns, what it failed with, or that there was no time for it."""
        if time.monotonic() - self._start_s > self.seconds:
            self._fill(name, "not run: out of time")
            return
        try:
            self.add(name, *work())
        except Exception as error:  # whatever one line fails with, the others are measured
            self._fill(name, f"{type(error).__name__}: {error}")

    def _fill(self, name: str, reason: str) -> None:
        blank = ["-"] * (len(self._parts[-1].header) - 2)
        self.add(name, reason, *blank)
