"""The queue between those who ask for bytes and whatever reads them: order, priorities, cancelling, counting.

Demands start in the order in which they were asked for. Background pieces start only while nothing else is queued or in
flight, and few at a time. Knows files and byte ranges; how they are read is an engine's business.

Threads: any. One lock guards everything; a handle ends outside of it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from time import monotonic, perf_counter
from typing import Final, NamedTuple

from offload.errors import Cancelled, ClosedError, StorageError
from offload.results import EdgeUse
from offload.tiers.base import TransferHandle
from offload.tiers.files import File

BACKGROUND_READS: Final = 3
"""Background pieces in flight at once: two keep a disk busy, and a demand that comes waits for no more than these."""


class Piece(NamedTuple):
    """One disk request: fill `destination` from `offset`; at least `needed` bytes must exist."""

    file: File
    offset: int
    destination: memoryview
    needed: int
    handle: TransferHandle


class Taken(NamedTuple):
    """A piece in flight, since when, and whether it is a background one."""

    piece: Piece
    since_s: float
    in_background: bool


class RequestQueue:
    """See the module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._demands: deque[Piece] = deque()
        self._background: deque[Piece] = deque()
        self._in_flight = 0
        self._background_in_flight = 0
        self._ended = 0
        self._nbytes = 0
        self._busy_s = 0.0
        self._busy_since_s = 0.0
        self._closing = False

    # ---- for those who ask

    def put(self, pieces: Sequence[Piece], *, background: bool = False) -> None:
        """Adds pieces.

        Raises:
            ClosedError: the queue is closed.
        """
        with self._lock:
            if self._closing:
                raise ClosedError("the reader of the model's files is closed; load the model again")
            (self._background if background else self._demands).extend(pieces)
            self._work.notify(len(pieces))

    def promote(self, handles: Iterable[TransferHandle]) -> bool:
        """Background pieces of these transfers are demands from now on, and next. Whether there were any."""
        with self._lock:
            chosen = self._remove(handles)
            self._demands.extendleft(reversed(chosen))
            self._work.notify(len(chosen))
        return bool(chosen)

    def drop(self, handles: Iterable[TransferHandle]) -> None:
        """Background pieces of these transfers that have not started never will; their handles end with Cancelled."""
        with self._lock:
            dropped = self._remove(handles)
            self._idle.notify_all()
        _cancel(dropped)

    def cancel_pending(self) -> int:
        """Drops all pieces that have not started and tells how many."""
        with self._lock:
            dropped = [*self._demands, *self._background]
            self._demands.clear()
            self._background.clear()
            self._idle.notify_all()
        _cancel(dropped)
        return len(dropped)

    def drain(self, timeout_s: float) -> None:
        """Returns when nothing is queued or in flight.

        Raises:
            StorageError: no request ended for `timeout_s`.
        """
        with self._lock:
            seen, deadline = self._ended, monotonic() + timeout_s
            while self._demands or self._background or self._in_flight:
                if self._ended != seen:
                    seen, deadline = self._ended, monotonic() + timeout_s
                if not self._idle.wait(deadline - monotonic()) and monotonic() >= deadline:
                    raise self.hangs(timeout_s)

    def close(self) -> None:
        """Takes nothing more, drops what has not started, and lets `take` return None. Idempotent."""
        with self._lock:
            self._closing = True
            self._work.notify_all()
        self.cancel_pending()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or in flight."""
        with self._lock:
            return not (self._demands or self._background or self._in_flight)

    def statistics(self) -> EdgeUse:
        """Bytes that arrived and the time with a request in flight, up to now."""
        with self._lock:
            since = perf_counter() - self._busy_since_s if self._in_flight else 0.0
            return EdgeUse(bytes=self._nbytes, busy_s=self._busy_s + since)

    def hangs(self, timeout_s: float) -> StorageError:
        """What to raise when nothing has ended for so long."""
        return StorageError(
            f"reader: {self._in_flight} requests in flight and none ended for {timeout_s:g} s; "
            "the disk hangs or is overloaded: check it and load the model again"
        )

    # ---- for engines

    def take(self) -> Taken | None:
        """The next piece to read, waited for; None when the queue is closed."""
        with self._lock:
            while not self._may_start():
                if self._closing:
                    return None
                self._work.wait()
            return self._start()

    def take_ready(self, most: int) -> list[Taken]:
        """Up to `most` pieces that may start now."""
        taken: list[Taken] = []
        with self._lock:
            while len(taken) < most and self._may_start():
                taken.append(self._start())
        return taken

    def end(self, taken: Taken, error: Exception | None) -> None:
        """A piece has been read, or could not be."""
        piece = taken.piece
        with self._lock:
            self._in_flight -= 1
            self._background_in_flight -= taken.in_background
            self._ended += 1
            self._nbytes += 0 if error else len(piece.destination)
            if self._in_flight == 0:
                self._busy_s += perf_counter() - self._busy_since_s
            if self._background and self._may_start():
                self._work.notify(BACKGROUND_READS)
            self._idle.notify_all()
        if error is None:
            piece.handle.complete(len(piece.destination))
        else:
            piece.handle.fail(error)

    # ---- under the lock

    def _may_start(self) -> bool:
        if self._demands:
            return True
        return bool(self._background) and self._in_flight < BACKGROUND_READS

    def _start(self) -> Taken:
        in_background, now = not self._demands, perf_counter()
        if self._in_flight == 0:
            self._busy_since_s = now
        self._in_flight += 1
        self._background_in_flight += in_background
        return Taken((self._background if in_background else self._demands).popleft(), now, in_background)

    def _remove(self, handles: Iterable[TransferHandle]) -> list[Piece]:
        wanted = set(map(id, handles))
        removed = [piece for piece in self._background if id(piece.handle) in wanted]
        if removed:
            self._background = deque(piece for piece in self._background if id(piece.handle) not in wanted)
        return removed


def _cancel(pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        piece.handle.fail(Cancelled("the read was dropped before it started"))
