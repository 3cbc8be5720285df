"""Storages around a storage: one in which reads go wrong on demand, one with the speed of another disk.

For tests and simulations. Knows nothing of what is read.

Threads: reads are counted under a lock, so that exactly one read is the n-th, whichever worker does it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from offload.tiers.files import File, Storage

FaultKind = Literal["eio", "enospc", "eintr", "short", "truncated", "delay", "flip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens at the `at`-th read (from 1) of all files of a storage.

    Attributes:
        kind: eio, enospc, eintr: the read fails with that error number. short: it returns half of its bytes. truncated: it
            and every later read of that file find the end of the file. delay: it takes `seconds` longer. flip: its first
            byte arrives with all bits inverted.
    """

    at: int
    kind: FaultKind
    seconds: float = 0.0


class FaultyStorage:
    """`inner`, where the reads named by `faults` go wrong and all others are left alone."""

    def __init__(self, inner: Storage, faults: Sequence[Fault]) -> None:
        self._inner = inner
        self._faults = {fault.at: fault for fault in faults}
        self._lock = threading.Lock()
        self.reads = 0

    def open(self, path: Path) -> File:
        return _FaultyFile(self, self._inner.open(path))

    def next_fault(self) -> Fault | None:
        """Counts a read; the fault that hits it, if any."""
        with self._lock:
            self.reads += 1
            return self._faults.get(self.reads)


class _Wrapped:
    """A file that passes everything on."""

    def __init__(self, inner: File) -> None:
        self._inner = inner

    @property
    def path(self) -> Path:
        return self._inner.path

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    @property
    def direct(self) -> bool:
        return self._inner.direct

    @property
    def descriptor(self) -> None:
        """None: every read must come through `read_into`."""

    def read_into(self, destination: memoryview, offset: int) -> int:
        return self._inner.read_into(destination, offset)

    def changed(self) -> str | None:
        return self._inner.changed()

    def close(self) -> None:
        self._inner.close()


class _FaultyFile(_Wrapped):
    def __init__(self, storage: FaultyStorage, inner: File) -> None:
        super().__init__(inner)
        self._storage = storage
        self._truncated = False

    def read_into(self, destination: memoryview, offset: int) -> int:
        fault = self._storage.next_fault()
        kind = None if fault is None else fault.kind
        self._truncated |= kind == "truncated"
        if self._truncated:
            return 0
        if kind in ("eio", "enospc", "eintr"):
            number = {"eio": errno.EIO, "enospc": errno.ENOSPC, "eintr": errno.EINTR}[kind]
            raise OSError(number, os.strerror(number))  # EINTR becomes InterruptedError
        if fault is not None and kind == "delay":
            time.sleep(fault.seconds)
        count = self._inner.read_into(destination, offset)
        if kind == "flip" and count:
            destination[0] ^= 0xFF
        return count // 2 if kind == "short" else count


class Clock(Protocol):
    """Time, real or not."""

    def now(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep_until(self, moment_s: float) -> None: ...


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, moment_s: float) -> None:
        time.sleep(max(0.0, moment_s - time.perf_counter()))


class VirtualClock:
    """Stands still but for those who sleep: they advance it, and take no real time."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        return self._now_s

    def sleep_until(self, moment_s: float) -> None:
        with self._lock:
            self._now_s = max(self._now_s, moment_s)


class ThrottledStorage:
    """`inner` behind one link of `bandwidth_bps`; each read also takes `latency_s`, which reads in parallel share.

    The bytes of all reads queue up on the link, whatever the number of readers.
    """

    def __init__(self, inner: Storage, bandwidth_bps: float, latency_s: float, clock: Clock) -> None:
        assert bandwidth_bps > 0 and latency_s >= 0, (bandwidth_bps, latency_s)
        self._inner = inner
        self._bandwidth_bps = bandwidth_bps
        self._latency_s = latency_s
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at_s = clock.now()

    def open(self, path: Path) -> File:
        return _ThrottledFile(self, self._inner.open(path))

    def occupy(self, nbytes: int) -> None:
        """Returns when `nbytes` have passed the link."""
        with self._lock:
            self._free_at_s = max(self._free_at_s, self._clock.now()) + nbytes / self._bandwidth_bps
            arrival_s = self._free_at_s + self._latency_s
        self._clock.sleep_until(arrival_s)


class _ThrottledFile(_Wrapped):
    def __init__(self, storage: ThrottledStorage, inner: File) -> None:
        super().__init__(inner)
        self._storage = storage

    def read_into(self, destination: memoryview, offset: int) -> int:
        count = self._inner.read_into(destination, offset)
        self._storage.occupy(count)
        return count
