"""The I/O shim: every byte of every model file comes through `File.read_into`.

Direct I/O where the file system takes it, else buffered reads that leave no page cache behind. Never a mapping: a file
truncated under a mapping kills the process, a short read is an error. Knows nothing of tensors, threads or queues.

Threads: `read_into` and `changed` may run in any number of threads at once; `open` and `close` belong to the owner, who
closes after the last read has returned.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
import threading
from pathlib import Path
from typing import Final, Protocol

from offload.errors import AllocationError, StorageError
from offload.units import PAGE, align_down

O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)
# O_NONBLOCK does nothing to a regular file, and keeps a named pipe from blocking the open for ever
OPEN_FLAGS: Final[int] = (
    os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)
HAS_PREADV: Final = hasattr(os, "preadv")
HAS_FADVISE: Final = hasattr(os, "posix_fadvise")
F_NOCACHE: Final = 48  # macOS <sys/fcntl.h>; the fcntl module of other systems does not name it


class File(Protocol):
    """An open file, pinned to what it was when it was opened."""

    @property
    def path(self) -> Path: ...

    @property
    def nbytes(self) -> int:
        """Size when opened."""
        ...

    @property
    def direct(self) -> bool:
        """Reads bypass the page cache; offset, length and address must then be multiples of `PAGE`."""
        ...

    @property
    def descriptor(self) -> int | None:
        """Of the operating system, for reads that bypass `read_into`; None where they must not."""
        ...

    def read_into(self, destination: memoryview, offset: int) -> int:
        """Reads at most `len(destination)` bytes; tells how many came, 0 at the end of the file. May raise OSError."""
        ...

    def changed(self) -> str | None:
        """What is different from when the file was opened (`"its size went from 8 to 4 bytes"`), or None."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class Storage(Protocol):
    """Where files come from."""

    def open(self, path: Path) -> File:
        """
        Raises:
            StorageError: missing, unreadable, or not a regular file. AllocationError: the system lacks memory.
        """
        ...


class LocalFile:
    """A file of the operating system, read with `preadv`."""

    __slots__ = ("_fd", "_lock", "_pinned", "direct", "nbytes", "path")

    def __init__(self, path: Path, fd: int, *, direct: bool) -> None:
        self.path = path
        self.direct = direct
        self._fd = fd
        self._lock = threading.Lock()
        self._pinned = os.fstat(fd)
        self.nbytes = self._pinned.st_size

    @property
    def descriptor(self) -> int | None:
        return self._fd if self.direct else None

    def read_into(self, destination: memoryview, offset: int) -> int:
        count = self._read_at(destination, offset)
        if not self.direct and HAS_FADVISE and count:
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def _read_at(self, destination: memoryview, offset: int) -> int:
        if HAS_PREADV:
            return os.preadv(self._fd, [destination], offset)
        with self._lock:  # Windows: one file position for all threads
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(destination))
        destination[: len(data)] = data
        return len(data)

    def changed(self) -> str | None:
        try:
            opened, named = os.fstat(self._fd), self.path.stat()
        except FileNotFoundError:
            return "it was removed"
        except OSError as error:
            return f"it cannot be examined any more ({error.strerror})"
        return _difference(self._pinned, opened) or _difference(self._pinned, named)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class LocalStorage:
    """Files of this machine. `direct=False` never asks for direct I/O."""

    def __init__(self, *, direct: bool = True) -> None:
        self._direct = direct and O_DIRECT != 0

    def open(self, path: Path) -> LocalFile:
        try:
            return self._open(path)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise AllocationError(
                    f"{path}: no memory to open it with; close other programs or lower --ram", needed_bytes=PAGE
                ) from error
            raise StorageError(
                f"{path}: cannot be opened: {error.strerror}; check the path and its permissions",
                path=str(path),
                errno=error.errno,
            ) from error

    def _open(self, path: Path) -> LocalFile:
        fd = _open_direct(path) if self._direct else None
        file = LocalFile(path, os.open(path, OPEN_FLAGS) if fd is None else fd, direct=fd is not None)
        if not stat.S_ISREG(file._pinned.st_mode):
            file.close()
            raise StorageError(f"{path}: not a regular file; name a model file", path=str(path))
        if not file.direct:
            _keep_out_of_cache(file._fd)
        return file


def read_exactly(file: File, destination: memoryview, offset: int, needed: int) -> None:
    """Fills at least the first `needed` bytes of `destination` from `offset`; what follows them is undefined.

    With a direct file the destination's address and length and the offset are multiples of `PAGE`, so the range may pass
    the end of the file; that is no error as long as `needed` bytes exist.

    Raises:
        StorageError: the file ended before, or the operating system reported an error.
    """
    got = 0
    while got < needed:
        start = align_down(got) if file.direct else got  # direct I/O goes on at a page border
        try:
            count = file.read_into(destination[start:], offset + start)
        except InterruptedError:
            continue
        except OSError as error:
            raise read_failure(file, offset, needed, got, error) from error
        if start + count <= got:
            ends_early = f"the file ends early (it had {file.nbytes} bytes)"
            raise read_failure(file, offset, needed, got, ends_early)
        got = start + count


def read_failure(file: File, offset: int, needed: int, got: int, cause: OSError | str) -> StorageError:
    """What to raise when `needed` bytes were wanted from `offset`, and `got` came."""
    number = None if isinstance(cause, str) else cause.errno
    reason = cause if isinstance(cause, str) else cause.strerror or (os.strerror(number) if number else str(cause))
    return StorageError(
        f"{file.path}: reading {needed} bytes at offset {offset} stopped after {got}: {reason}; "
        "check the disk and the file, then load the model again",
        path=str(file.path),
        offset=offset,
        errno=number,
    )


def _open_direct(path: Path) -> int | None:
    """A descriptor that is proven to read directly, or None where the file system refuses."""
    try:
        fd = os.open(path, OPEN_FLAGS | O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    try:
        with mmap.mmap(-1, PAGE) as page:  # anonymous mappings are page-aligned
            os.preadv(fd, [page], 0)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EINVAL, errno.EISDIR, errno.ESPIPE, errno.EAGAIN):
            return None  # opened, yet not readable in this way; the buffered open reports what is really wrong
        raise
    return fd


def _keep_out_of_cache(fd: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, F_NOCACHE, 1)
    elif HAS_FADVISE:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead, whose pages nobody would drop


def _difference(before: os.stat_result, after: os.stat_result) -> str | None:
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
        return "it was replaced by another file"
    if before.st_size != after.st_size:
        return f"its size went from {before.st_size} to {after.st_size} bytes"
    if before.st_mtime_ns != after.st_mtime_ns:
        return "it was written to"
    return None
