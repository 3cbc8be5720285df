"""Ctrl-C as a request to stop one thing, not the program. POSIX and Windows, main thread only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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
