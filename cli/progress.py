"""Progress bars on stderr for what takes longer than a second. Draws nothing where nobody watches."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PATIENCE_S: Final = 1.0


def bars_wanted(*, quiet: bool = False) -> bool:
    """Bars need a terminal on stderr, no `NO_COLOR`, and a user who did not ask for quiet."""
    return not quiet and sys.stderr.isatty() and not os.environ.get("NO_COLOR")


class Bars:
    """Bars that appear after `patience_s` and vanish at the end.

    `update` may be called from any thread. `done == total` removes the bar of that phase; `stop` removes all, which must
    happen before anything else is written to the terminal.
    """

    def __init__(self, *, enabled: bool, patience_s: float = PATIENCE_S) -> None:
        self._enabled = enabled
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}

    def update(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` steps of `phase` are finished."""
        if not self._enabled:
            return
        with self._lock:
            started = self._started.setdefault(phase, time.monotonic())
            if phase not in self._tasks and time.monotonic() - started < self._patience_s:
                return
            self._draw(phase, done, total)

    def prefill(self, done: int, total: int) -> None:
        """`update` in the shape of the option `on_prefill`."""
        self.update("reading the prompt", done, total)

    def _draw(self, phase: str, done: int, total: int) -> None:
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            console = Console(stderr=True)
            self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._progress.start()
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=total)
        self._progress.update(self._tasks[phase], completed=done, total=total)
        if done >= total:
            self._progress.remove_task(self._tasks.pop(phase))
            self._started.pop(phase, None)

    def stop(self) -> None:
        """Remove all bars. A later `update` starts anew."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
            self._progress, self._tasks, self._started = None, {}, {}

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
