"""Handles of transfers in flight, the token that cancels a wait, and what every reader of extents offers.

Starting a transfer returns a handle; blocking is start plus wait. Knows nothing of files, memory or devices.

Threads: workers call `complete` and `fail`, any thread calls the rest. All state of a handle is guarded by its condition;
`done` reads a single integer and takes no lock. A handle ends once, after its last piece, never before: when it has
ended nobody writes into the destination any more.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

from offload.blocks import Extent
from offload.errors import Cancelled, StorageError
from offload.results import EdgeUse

TIMEOUT_S: Final = 60.0  # without a single finished piece; spinning disks wake up in under 20 s
POLL_S: Final = 0.01  # how often a wait looks at its cancel token

OnRead = Callable[[float, float, int, Path, int], None]
"""Instrument: `on_read(start_s, end_s, nbytes, path, offset)` after each disk request, in `time.perf_counter` seconds."""


class CancelToken:
    """Set once by any thread, seen by every wait that was given it, and by native code that looks at `flag`.

    Attributes:
        flag: a C string, empty until cancelled and of one character afterwards.
    """

    __slots__ = ("_event", "flag")

    def __init__(self) -> None:
        self._event = threading.Event()
        self.flag = ctypes.create_string_buffer(2)

    def cancel(self) -> None:
        self.flag[0] = b"!"
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None) -> bool:
        """Sleeps for `timeout` seconds or until cancelled; tells whether it was."""
        return self._event.wait(timeout)

    def raise_if_cancelled(self) -> None:
        """
        Raises:
            Cancelled: `cancel` was called.
        """
        if self._event.is_set():
            raise Cancelled("cancelled by the caller")


class Handle(Protocol):
    """A transfer in flight, whatever moves it."""

    @property
    def nbytes(self) -> int: ...

    @property
    def error(self) -> Exception | None: ...

    def done(self) -> bool: ...

    def wait(self, cancel: CancelToken | None = None, timeout_s: float = TIMEOUT_S) -> None: ...


class TransferHandle:
    """A transfer of `nbytes` in `pieces`, each ended by one call of `complete` or `fail`. Keeps the first error."""

    __slots__ = ("_changed", "_completed_bytes", "_error", "_remaining", "nbytes")

    def __init__(self, *, pieces: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._remaining = pieces
        self._completed_bytes = 0
        self._error: Exception | None = None
        self._changed = threading.Condition()

    @classmethod
    def completed(cls, nbytes: int = 0) -> TransferHandle:
        """A handle of a transfer that needed no work or is already over."""
        handle = cls(pieces=0, nbytes=nbytes)
        handle._completed_bytes = nbytes
        return handle

    @property
    def error(self) -> Exception | None:
        """What the first failed piece raised, if any has failed so far."""
        return self._error

    def done(self) -> bool:
        """Whether every piece has ended, well or badly."""
        return self._remaining == 0

    def complete(self, nbytes: int) -> None:
        """A piece of `nbytes` arrived."""
        with self._changed:
            self._completed_bytes += nbytes
            self._end_piece()

    def fail(self, error: Exception) -> None:
        """A piece ended without its bytes."""
        with self._changed:
            self._error = self._error or error
            self._end_piece()

    def wait(self, cancel: CancelToken | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """Returns when all bytes have arrived.

        After Cancelled or a time-out pieces may still be in flight: the destination must not be reused before `done`.

        Args:
            cancel: ends the wait within 20 ms when set.
            timeout_s: longest time without progress; each piece that ends restarts it.

        Raises:
            StorageError: a piece failed, or nothing arrived for `timeout_s`.
            Cancelled: `cancel` was set, or the transfer was dropped before it started.
        """
        with self._changed:
            self._wait_for_pieces(cancel, timeout_s)
        if self._error is not None:
            raise self._error

    def _wait_for_pieces(self, cancel: CancelToken | None, timeout_s: float) -> None:
        seen, deadline = self._remaining, time.monotonic() + timeout_s
        while self._remaining:
            if cancel is not None:
                cancel.raise_if_cancelled()
            if self._remaining != seen:
                seen, deadline = self._remaining, time.monotonic() + timeout_s
            left = deadline - time.monotonic()
            if left <= 0:
                raise StorageError(
                    f"transfer: no progress for {timeout_s:g} s with {self._completed_bytes} of {self.nbytes} bytes done; "
                    "the disk hangs or is overloaded: check it and load the model again"
                )
            self._changed.wait(left if cancel is None else min(left, POLL_S))

    def _end_piece(self) -> None:
        assert self._remaining > 0, "a handle was completed more often than it has pieces"
        self._remaining -= 1
        if self._remaining == 0:  # who waits looks for progress by itself, when it has waited long enough
            self._changed.notify_all()


Group = Sequence[tuple[Extent, memoryview]]
"""Extents that are one transfer, each with where its window goes."""


class Reader(Protocol):
    """What serves extents of files into memory. `NvmeReader` reads disks, `MemoryReader` is the plain reference."""

    def read_extent(self, extent: Extent, destination: memoryview) -> Handle:
        """Starts reading the extent's page-aligned window into the head of `destination`."""
        ...

    def read_groups(self, groups: Sequence[Group], *, background: bool = False) -> Sequence[TransferHandle]:
        """Starts several transfers in one submission, each of some extents. `background`: when there is nothing else."""
        ...

    def promote(self, handles: Iterable[TransferHandle]) -> None:
        """Background reads that are needed now: what has not started of them is next."""
        ...

    def drop(self, handles: Iterable[TransferHandle]) -> None:
        """Background reads that nobody needs: what has not started of them never will, and they end with Cancelled."""
        ...

    def cancel_pending(self) -> int:
        """Drops what has not started; tells how many pieces. Their handles end with Cancelled."""
        ...

    def drain(self, timeout_s: float = TIMEOUT_S) -> None:
        """Returns when nothing is queued or in flight, so that destinations may be reused."""
        ...

    def check_files(self) -> None:
        """Raises StorageError when a file is no longer the one that was opened."""
        ...

    def statistics(self) -> EdgeUse: ...

    def close(self) -> None: ...
