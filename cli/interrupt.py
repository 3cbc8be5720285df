"""Ctrl-C as a request to stop one thing, not the program; keys that come at the wrong time; signals that end the program."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def keys_unseen() -> Iterator[None]:
    """Within the block what is typed is kept for the next prompt, but not shown: it would stand amid what is written."""
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP first leave it, so that the terminal gets back its cursor, echo and line editing.

    Then the signal does what it would have done at once. One that somebody ignores or handles is left alone, and so is a
    second one: it need not wait for the unwinding. Off the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    received: list[int] = []

    def restore() -> None:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        restore()
        received.append(number)
        raise SystemExit(128 + number)  # no other error of ours passes through asyncio, which reads the prompt's keys

    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
        for number in received:
            os.kill(os.getpid(), number)


@contextmanager
def interrupt_calls(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block the first Ctrl-C calls `stop` and a second one raises KeyboardInterrupt.

    `stop` runs on a thread of its own: a signal handler runs between two instructions of the main thread, which may hold
    the very lock that `stop` needs. Off the main thread, where no handler can be installed, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stoppers: list[threading.Thread] = []

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stoppers.append(threading.Thread(target=stop, name="offload-interrupt"))
        stoppers[-1].start()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for stopper in stoppers:
            stopper.join()
