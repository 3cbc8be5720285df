"""Two ways to serve a queue of reads: threads that each read one piece, or one thread that minds many of the kernel's own.

Both read the same pieces in the same order, check the same things, and survive every error: the piece's handle carries it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import Final, Protocol

from offload.errors import StorageError
from offload.tiers.aio import AioContext, Event, Request
from offload.tiers.base import OnRead
from offload.tiers.checked import check_unchanged, read_checked
from offload.tiers.files import File, read_failure
from offload.tiers.requests import Piece, RequestQueue, Taken

THREAD_NAME: Final = "offload-nvme"
_LINGER_S: Final = 0.02
"""How long the thread that minds the kernel's requests waits for more of them before it sleeps: to wake it costs the one who
asks a switch of threads, once for every layer of a token."""


class Engine(Protocol):
    """Serves a queue until that is closed."""

    def kick(self) -> None:
        """Something was put into the queue."""
        ...

    def join(self, timeout_s: float) -> bool:
        """After the queue was closed: waits for what is in flight; whether all of it has ended."""
        ...


class ThreadEngine:
    """As many threads as requests in flight."""

    def __init__(self, queue: RequestQueue, workers: int, on_read: OnRead | None) -> None:
        self._queue = queue
        self._on_read = on_read
        self._threads = [
            threading.Thread(target=self._serve, name=f"{THREAD_NAME}-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def kick(self) -> None:
        """The queue wakes the threads itself."""

    def join(self, timeout_s: float) -> bool:
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self) -> None:
        while self._serve_one():
            pass  # a frame of its own per piece: an idle worker must not keep a destination alive

    def _serve_one(self) -> bool:
        taken = self._queue.take()
        if taken is None:
            return False
        self._queue.end(taken, self._read(taken))
        return True

    def _read(self, taken: Taken) -> Exception | None:
        piece = taken.piece
        try:
            read_checked(piece.file, piece.destination, piece.offset, piece.needed)
            note(self._on_read, taken)
        except Exception as error:
            return error
        return None


class AioEngine:
    """One thread, and a context of the kernel with up to `depth` requests.

    Args:
        context: what takes them; tests bring their own.
    """

    def __init__(self, queue: RequestQueue, depth: int, on_read: OnRead | None, context: AioContext) -> None:
        self._queue = queue
        self._on_read = on_read
        self._context = context
        self._lock = threading.Lock()  # of what follows; two threads may submit
        self._started = threading.Condition(self._lock)
        self._free = list(range(depth))
        self._flying: dict[int, Taken] = {}
        self._closing = False
        self._asleep = False
        self._thread = threading.Thread(target=self._serve, name=f"{THREAD_NAME}-aio", daemon=True)
        self._thread.start()

    def kick(self) -> None:
        with self._lock:
            failed = self._submit()
        self._end(failed)

    def join(self, timeout_s: float) -> bool:
        with self._lock:
            self._closing = True
            self._started.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._context.close()
        return True

    def _submit(self) -> list[tuple[Taken, Exception]]:
        """Under the lock: starts what may start. Returns what could not be."""
        failed: list[tuple[Taken, Exception]] = []
        ready = self._queue.take_ready(len(self._free))
        while ready:
            numbers, count = [self._free.pop() for _ in ready], 0
            try:
                count = self._context.submit(zip(numbers, (_request(taken.piece) for taken in ready), strict=True))
            except OSError as error:  # of the first; the others are tried by themselves
                taken = ready.pop(0)
                piece = taken.piece
                failed.append((taken, read_failure(piece.file, piece.offset, piece.needed, 0, error)))
            self._flying.update(zip(numbers[:count], ready[:count], strict=True))
            self._free += numbers[count:]
            ready = ready[count:]
        if self._flying and self._asleep:
            self._started.notify()
        return failed

    def _serve(self) -> None:
        events: Sequence[Event] = ()
        while self._is_wanted(sleep=not events):
            events = ()
            with suppress(OSError):
                events = self._context.wait(_LINGER_S)
            if events:
                self._land(events)

    def _is_wanted(self, *, sleep: bool) -> bool:
        """Whether anything is or may come in flight; with `sleep`, waits until something is."""
        with self._lock:
            while sleep and not self._flying and not self._closing:
                self._asleep = True
                self._started.wait()
                self._asleep = False
            return bool(self._flying) or not self._closing

    def _land(self, events: Sequence[Event]) -> None:
        with self._lock:
            landed = [(self._flying.pop(event.number), event.result) for event in events]
            self._free += [event.number for event in events]
        changes = _changes({taken.piece.file for taken, _ in landed})
        self._end([(taken, changes.get(taken.piece.file) or self._check(taken, result)) for taken, result in landed])
        self.kick()

    def _check(self, taken: Taken, result: int) -> Exception | None:
        piece = taken.piece
        try:
            if result < 0:
                raise read_failure(piece.file, piece.offset, piece.needed, 0, OSError(-result, ""))
            if result < piece.needed:  # rare, and perhaps the end of the file: read again, and to the end
                read_checked(piece.file, piece.destination, piece.offset, piece.needed)
            note(self._on_read, taken)
        except Exception as error:
            return error
        return None

    def _end(self, pieces: Sequence[tuple[Taken, Exception | None]]) -> None:
        for taken, error in pieces:
            self._queue.end(taken, error)


def note(on_read: OnRead | None, taken: Taken) -> None:
    """Tells the instrument of a read."""
    if on_read is not None:
        piece = taken.piece
        on_read(taken.since_s, perf_counter(), len(piece.destination), piece.file.path, piece.offset)


def _changes(files: set[File]) -> dict[File, StorageError]:
    """Which of these files are no longer what was opened."""
    changed = {}
    for file in files:
        try:
            check_unchanged(file)
        except StorageError as error:
            changed[file] = error
    return changed


def _request(piece: Piece) -> Request:
    descriptor = piece.file.descriptor
    assert descriptor is not None
    address = ctypes.addressof(ctypes.c_char.from_buffer(piece.destination))
    return Request(descriptor, address, len(piece.destination), piece.offset)


def make_engine(queue: RequestQueue, files: Sequence[File], workers: int, on_read: OnRead | None) -> Engine:
    """The kernel's own asynchronous reads where all files take them, else threads."""
    if all(file.descriptor is not None for file in files):
        with suppress(OSError):
            return AioEngine(queue, workers, on_read, AioContext(workers))
    return ThreadEngine(queue, workers, on_read)
