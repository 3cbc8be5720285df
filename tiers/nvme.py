"""The NVMe tier: worker threads that read extents of files by direct I/O into memory that the caller owns.

An extent is read as its page-aligned window, in pieces; pieces of all extents start in the order in which they were asked
for. Background reads, of what may be needed, start only while nothing else is queued or in flight. Knows files and byte
ranges, not what they mean or who will use them.

Threads: all but `close`, which is the owner's, may be called from any thread. The queues and the counters are guarded by
one lock; a handle ends on a worker's thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import monotonic, perf_counter
from typing import Final, NamedTuple

from offload.blocks import Extent
from offload.config import READ_BYTES
from offload.errors import Cancelled, ClosedError, StorageError
from offload.results import EdgeUse
from offload.tiers.base import TIMEOUT_S, OnRead, TransferHandle
from offload.tiers.checked import check_inside, check_unchanged, open_all, read_checked
from offload.tiers.files import File, Storage
from offload.units import PAGE

BACKGROUND_READS: Final = 2
"""Background pieces in flight at once: two keep a disk busy, and a demand that comes waits for no more than these."""


class Piece(NamedTuple):
    """One disk request: fill `destination` from `offset`; at least `needed` bytes must exist."""

    file: File
    offset: int
    destination: memoryview
    needed: int
    handle: TransferHandle


class NvmeReader:
    """Reads extents of `files` with `workers` requests in flight, each of at most `read_bytes`.

    Args:
        storage: opens the files; all are pinned to what they are now.
        on_read: called on the worker's thread after each request.

    Raises:
        StorageError: a file cannot be opened.
    """

    def __init__(
        self,
        storage: Storage,
        files: Sequence[Path],
        workers: int,
        read_bytes: int = READ_BYTES,
        on_read: OnRead | None = None,
    ) -> None:
        assert workers > 0 and read_bytes > 0 and read_bytes % PAGE == 0, (workers, read_bytes)
        self._files = open_all(storage, files)
        self._read_bytes = read_bytes
        self._on_read = on_read
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._queue: deque[Piece] = deque()
        self._background: deque[Piece] = deque()
        self._background_in_flight = 0
        self._use = _Use()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"offload-nvme-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def read_extent(self, extent: Extent, destination: memoryview) -> TransferHandle:
        """Starts reading the extent's window; its bytes will be at `destination[extent.lead:]`.

        Args:
            destination: writable, page-aligned, at least `extent.window_nbytes` long; not to be touched before the handle
                has ended. What follows the extent in it is undefined.

        Raises:
            StorageError: the file ends before the extent does.
            ClosedError: the reader is closed.
        """
        return self.read_extents([(extent, destination)])[0]

    def read_extents(
        self, requests: Sequence[tuple[Extent, memoryview]], *, background: bool = False
    ) -> list[TransferHandle]:
        """Starts several reads in one submission; each as `read_extent` does. `background`: when there is nothing else."""
        handles: list[TransferHandle] = []
        pieces: list[Piece] = []
        for extent, destination in requests:
            file = self._files[extent.path]
            assert len(destination) >= extent.window_nbytes, (len(destination), extent)
            check_inside(file, extent)
            split = self._split(file, extent, destination) if extent.nbytes else []
            handles.append(split[0].handle if split else TransferHandle.completed())
            pieces += split
        with self._lock:
            if self._closing:
                raise ClosedError("the reader of the model's files is closed; load the model again")
            (self._background if background else self._queue).extend(pieces)
            self._work.notify(len(pieces))
        return handles

    def promote(self, handles: Iterable[TransferHandle]) -> None:
        """Background reads that are needed now: what has not started of them is next."""
        wanted = set(map(id, handles))
        with self._lock:
            chosen = [piece for piece in self._background if id(piece.handle) in wanted]
            if chosen:
                self._background = deque(piece for piece in self._background if id(piece.handle) not in wanted)
                self._queue.extendleft(reversed(chosen))
                self._work.notify(len(chosen))

    def drop(self, handles: Iterable[TransferHandle]) -> None:
        """Background reads that nobody needs: what has not started of them never will, and they end with Cancelled."""
        unwanted = set(map(id, handles))
        with self._lock:
            dropped = [piece for piece in self._background if id(piece.handle) in unwanted]
            if dropped:
                self._background = deque(piece for piece in self._background if id(piece.handle) not in unwanted)
                self._idle.notify_all()
        _fail(dropped)

    def cancel_pending(self) -> int:
        """Drops the pieces that have not started and tells how many; their handles end with Cancelled."""
        with self._lock:
            dropped = [*self._queue, *self._background]
            self._queue.clear()
            self._background.clear()
            self._idle.notify_all()
        _fail(dropped)
        return len(dropped)

    def drain(self, timeout_s: float = TIMEOUT_S) -> None:
        """Returns when nothing is queued or in flight.

        Raises:
            StorageError: no request ended for `timeout_s`.
        """
        with self._lock:
            seen, deadline = self._use.ended, monotonic() + timeout_s
            while self._queue or self._background or self._use.in_flight:
                if self._use.ended != seen:
                    seen, deadline = self._use.ended, monotonic() + timeout_s
                if not self._idle.wait(deadline - monotonic()) and monotonic() >= deadline:
                    raise self._hangs(timeout_s)

    def check_files(self) -> None:
        """
        Raises:
            StorageError: a file is no longer the one that was opened.
        """
        for file in self._files.values():
            check_unchanged(file)

    def statistics(self) -> EdgeUse:
        """Bytes that arrived and the time with a request in flight, up to now."""
        with self._lock:
            return EdgeUse(bytes=self._use.nbytes, busy_s=self._use.busy_until(perf_counter()))

    def close(self) -> None:
        """Drops what has not started, waits for what has, ends the workers, closes the files. Idempotent.

        Raises:
            StorageError: a request hangs; its file stays open.
        """
        with self._lock:
            self._closing = True
            self._work.notify_all()
        self.cancel_pending()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            if thread.is_alive():
                raise self._hangs(TIMEOUT_S)
        for file in self._files.values():
            file.close()

    def _split(self, file: File, extent: Extent, destination: memoryview) -> list[Piece]:
        window, step = extent.window_nbytes, self._read_bytes
        handle = TransferHandle(pieces=-(-window // step), nbytes=window)
        pieces = []
        for start in range(0, window, step):
            stop = min(start + step, window)
            offset = extent.window_offset + start
            needed = min(extent.end - offset, stop - start)
            pieces.append(Piece(file, offset, destination[start:stop], needed, handle))
        return pieces

    def _serve(self) -> None:
        while self._serve_one():
            pass  # a frame of its own per piece: an idle worker must not keep a destination alive

    def _serve_one(self) -> bool:
        with self._lock:
            while not (self._queue or self._is_link_idle()):
                if self._closing:
                    return False
                self._work.wait()
            in_background = not self._queue
            piece = (self._background if in_background else self._queue).popleft()
            self._background_in_flight += in_background
            self._use.start(perf_counter())
        error = self._read(piece)
        with self._lock:
            self._background_in_flight -= in_background
            self._use.end(perf_counter(), 0 if error else len(piece.destination))
            if self._is_link_idle():
                self._work.notify(BACKGROUND_READS)
            self._idle.notify_all()
        if error is None:
            piece.handle.complete(len(piece.destination))
        else:
            piece.handle.fail(error)
        return True

    def _is_link_idle(self) -> bool:
        """Whether a background piece may start: nothing but a few of its kind is queued or in flight."""
        in_flight = self._background_in_flight
        return bool(self._background) and self._use.in_flight == in_flight < BACKGROUND_READS and not self._queue

    def _read(self, piece: Piece) -> Exception | None:
        """Reads a piece and returns what went wrong: the worker survives every error, the handle carries it."""
        start_s = perf_counter()
        try:
            read_checked(piece.file, piece.destination, piece.offset, piece.needed)
            if self._on_read is not None:
                size = len(piece.destination)
                self._on_read(start_s, perf_counter(), size, piece.file.path, piece.offset)
        except Exception as error:
            return error
        return None

    def _hangs(self, timeout_s: float) -> StorageError:
        return StorageError(
            f"reader: {self._use.in_flight} requests in flight and none ended for {timeout_s:g} s; "
            "the disk hangs or is overloaded: check it and load the model again"
        )


def _fail(pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        piece.handle.fail(Cancelled("the read was dropped before it started"))


class _Use:
    """Counts traffic, and the time with at least one request in flight. The reader's lock guards it."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.in_flight = 0
        self.ended = 0
        self._busy_s = 0.0
        self._since_s = 0.0

    def start(self, now_s: float) -> None:
        if self.in_flight == 0:
            self._since_s = now_s
        self.in_flight += 1

    def end(self, now_s: float, nbytes: int) -> None:
        self.nbytes += nbytes
        self.in_flight -= 1
        self.ended += 1
        if self.in_flight == 0:
            self._busy_s += now_s - self._since_s

    def busy_until(self, now_s: float) -> float:
        return self._busy_s + (now_s - self._since_s if self.in_flight else 0.0)
