"""A file for what memory has no room for while the process runs: nobody else sees it, and it is gone with the process.

It lies in a folder of the user's choice and has no name there once it is open, where the system knows such files. Reads are
those of any `File`; writes are started here and end on a thread of the file's own, in the order in which they were started.

Threads: `start_write` belongs to the driver; handles may be waited for from any thread.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Final

from offload.errors import StorageError
from offload.results import EdgeUse
from offload.tiers.base import TransferHandle
from offload.tiers.files import O_DIRECT, LocalFile
from offload.units import PAGE, align_up, format_size

_Write = tuple[int, memoryview, TransferHandle]
MODE: Final = 0o600


class SpillFile(LocalFile):
    """A `File` of `nbytes`, all of which may be read once it was written. Takes room on disk only where it was written.

    Raises:
        StorageError: the folder cannot be written.
    """

    __slots__ = ("_thread", "_writes", "_written")

    def __init__(self, folder: Path, nbytes: int) -> None:
        path = folder / f".offload-{os.getpid()}-{secrets.token_hex(4)}.kv"
        fd, direct = _create(path, align_up(nbytes))
        super().__init__(path, fd, direct=direct)
        self._written = EdgeUse(bytes=0, busy_s=0.0)
        self._writes: SimpleQueue[_Write | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="offload-spill", daemon=True)
        self._thread.start()

    def start_write(self, offset: int, source: memoryview) -> TransferHandle:
        """Starts writing `source`, which must not change before the handle has ended.

        Offset, length and address are multiples of `PAGE`. The handle ends with StorageError when the disk refuses.
        """
        assert offset % PAGE == 0 and len(source) % PAGE == 0 and offset + len(source) <= self.nbytes, (
            offset,
            len(source),
        )
        handle = TransferHandle(pieces=1, nbytes=len(source))
        self._writes.put((offset, source, handle))
        return handle

    def statistics(self) -> EdgeUse:
        """Bytes that were written, and the time that took."""
        return self._written

    def changed(self) -> str | None:
        return None  # nobody else has it

    def close(self) -> None:
        """Ends what is being written. Idempotent."""
        if self._thread.is_alive():
            self._writes.put(None)
            self._thread.join()
        super().close()

    def _serve(self) -> None:
        while (write := self._writes.get()) is not None:
            offset, source, handle = write
            start_s = perf_counter()
            try:
                self._write(offset, source)
            except OSError as error:
                handle.fail(self._failure(offset, len(source), error))
            else:
                self._written += EdgeUse(bytes=len(source), busy_s=perf_counter() - start_s)
                handle.complete(len(source))
            del write, source, handle

    def _write(self, offset: int, source: memoryview) -> None:
        done = 0
        while done < len(source):
            count = os.pwrite(self._fd, source[done:], offset + done)
            done += count - count % PAGE if self.direct else count
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _failure(self, offset: int, nbytes: int, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path.parent}: writing {format_size(nbytes)} of the KV cache failed: {error.strerror}; "
            "free room on the disk, or raise --ram or lower --ctx",
            path=str(self.path.parent),
            offset=offset,
            errno=error.errno,
        )


class SpillStorage:
    """A `Storage` of files that are open already."""

    def __init__(self, file: SpillFile) -> None:
        self._file = file

    def open(self, path: Path) -> SpillFile:
        assert path == self._file.path
        return self._file


def _create(path: Path, nbytes: int) -> tuple[int, bool]:
    """A new file without a name, and whether it is written directly."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd, direct = os.open(path, flags | O_DIRECT, MODE), bool(O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with suppress(FileNotFoundError):
                path.unlink()
            fd, direct = os.open(path, flags, MODE), False
        path.unlink()
        os.ftruncate(fd, nbytes)
        assert stat.S_ISREG(os.fstat(fd).st_mode)
        return fd, direct
    except OSError as error:
        raise StorageError(
            f"{path.parent}: cannot hold {format_size(nbytes)} of the KV cache: {error.strerror}; choose another folder "
            "with --kv-dir",
            path=str(path.parent),
            errno=error.errno,
        ) from error
