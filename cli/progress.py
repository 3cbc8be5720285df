"""Progress bars on stderr for what takes longer than a second. Draws nothing where nobody watches."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Final, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

PATIENCE_S: Final = 1.0


def bars_wanted(*, quiet: bool = False) -> bool:
    """Bars need a terminal on stderr that can move its cursor, and a user who did not ask for quiet."""
    return not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class _Phase(NamedTuple):
    done: int
    total: int | None
    appears: threading.Timer


class Bars:
    """Bars that appear after `patience_s`, however rarely they hear of progress, and vanish at the end.

    `update` may be called from any thread. `done == total` removes the bar of that phase; `stop` removes all, which must
    happen before anything else is written to the terminal.
    """

    def __init__(self, *, enabled: bool, patience_s: float = PATIENCE_S) -> None:
        self._enabled = enabled
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._phases: dict[str, _Phase] = {}
        self._tasks: dict[str, TaskID] = {}

    def update(self, name: str, done: int, total: int | None) -> None:
        """`done` of `total` steps of the phase are finished; total None: nobody knows of how many."""
        if not self._enabled:
            return
        with self._lock:
            known = self._phases.get(name)
            if total is not None and done >= total:
                self._end(name)
            elif known is None:
                timer = threading.Timer(self._patience_s, self._appear, [name])
                timer.daemon = True
                self._phases[name] = _Phase(done, total, timer)
                timer.start()
            else:
                self._phases[name] = _Phase(done, total, known.appears)
                self._draw(name)

    def prefill(self, done: int, total: int) -> None:
        """`update` in the shape of the option `on_prefill`."""
        self.update("reading the prompt", done, total)

    def end(self, name: str) -> None:
        """The phase is over."""
        with self._lock:
            self._end(name)

    def _appear(self, name: str) -> None:
        """On the timer's thread."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is None or phase.appears is not threading.current_thread():
                return  # over, and perhaps begun anew
            if self._progress is None:
                columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
                console = Console(stderr=True)
                self._progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
                self._progress.start()
            self._tasks[name] = self._progress.add_task(name, total=phase.total)
            self._draw(name)

    def _draw(self, name: str) -> None:
        if self._progress is not None and name in self._tasks:
            phase = self._phases[name]
            self._progress.update(self._tasks[name], completed=phase.done, total=phase.total)

    def _end(self, name: str) -> None:
        phase = self._phases.pop(name, None)
        if phase is not None:
            phase.appears.cancel()
        if self._progress is not None and name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))

    def stop(self) -> None:
        """Remove all bars. A later `update` starts anew."""
        with self._lock:
            for name in list(self._phases):
                self._end(name)
            if self._progress is not None:
                self._progress.stop()
            self._progress, self._tasks = None, {}

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
