"""The rows of one segment: made, opened by whoever refers to them, appended to by one.

An open file holds a shared lock until the last reference to it is gone, so that nobody removes rows that a conversation
refers to. Rows behind those that the record counts do not exist for readers, and may be written again.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from xxhash import xxh3_64

from offload.config import KV_BUCKET
from offload.sessions.geometry import Bytes, Rows, ranges
from offload.sessions.locking import FLAGS, try_lock
from offload.sessions.record import Piece, Record
from offload.sessions.sealed import BrokenFile
from offload.tiers.files import HAS_FADVISE
from offload.units import MIB, PAGE
from offload.writing import PRIVATE

_UNSYNCED_BYTES: Final = 64 * MIB  # dirty pages are memory that the process is charged for


class RowsFile:
    """An open file of rows, which nobody removes meanwhile. `written_bytes` counts what was put into it here."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.written_bytes = 0
        self._fd = descriptor
        self._unsynced = 0
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls, path: Path, record: Record) -> RowsFile:
        """A new file, locked. Whoever makes it holds the segment's append lock.

        Raises:
            OSError: it cannot be made.
        """
        file = cls(path, os.open(path, FLAGS | os.O_CREAT | os.O_EXCL, PRIVATE))
        try_lock(file._fd, shared=True)
        file._write(memoryview(record.header()), 0)
        os.ftruncate(file._fd, record.geometry.file_nbytes(record.capacity))
        return file

    @classmethod
    def open(cls, path: Path, record: Record) -> RowsFile | None:
        """The record's file, locked; None where it is gone, or about to be.

        Raises:
            BrokenFile: something else is there. OSError: it cannot be opened.
        """
        if path.is_symlink():
            raise BrokenFile("a symbolic link, expected a file of rows")
        if path.exists() and not path.is_file():
            raise BrokenFile("not a regular file")
        try:
            file = cls(path, os.open(path, FLAGS))
        except FileNotFoundError:
            return None
        if not try_lock(file._fd, shared=True) or os.fstat(file._fd).st_nlink == 0:
            file.close()
            return None
        try:
            file._check(record)
        except BaseException:
            file.close()
            raise
        return file

    def append(self, record: Record, stop: int, rows: Rows) -> list[Piece]:
        """Writes rows for the positions from the record's last to `stop`, durably; tells what verifies them.

        Raises:
            OSError: they cannot be written.
        """
        geometry, pieces = record.geometry, []
        first, last = record.num_rows, stop - record.start
        hashes = {a: xxh3_64() for a, _ in ranges(first, last, KV_BUCKET)}
        for layer in range(geometry.num_layers):
            for a, b in ranges(first, last, geometry.block_rows):
                block = np.ascontiguousarray(rows(layer, record.start + a, record.start + b))
                assert block.shape == (geometry.num_heads, b - a, geometry.row_nbytes), block.shape
                for head, table in enumerate(block):
                    self._write(memoryview(table).cast("B"), geometry.offset(record.capacity, layer, head, a))
                for c, d in ranges(a, b, KV_BUCKET):
                    for table in part(block, c - a, d - a):
                        hashes[c].update(table)
        self._sync()
        for a, b in ranges(first, last, KV_BUCKET):
            pieces.append(Piece(b - a, hashes[a].hexdigest()))
        return pieces

    def close(self) -> None:
        """Gives up the lock. Idempotent."""
        self._close()

    def _check(self, record: Record) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise BrokenFile("not a regular file")
        expected = record.geometry.file_nbytes(record.capacity)
        if status.st_size != expected:
            raise BrokenFile(f"{status.st_size} bytes, expected {expected}")
        os.lseek(self._fd, 0, os.SEEK_SET)
        if os.read(self._fd, PAGE) != record.header():
            raise BrokenFile("its first page is not that of the segment")

    def _write(self, data: memoryview, offset: int) -> None:
        os.lseek(self._fd, offset, os.SEEK_SET)
        done = 0
        while done < len(data):
            done += os.write(self._fd, data[done:])
        self.written_bytes += len(data)
        self._unsynced += len(data)
        if self._unsynced >= _UNSYNCED_BYTES:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._unsynced = 0
        if HAS_FADVISE:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


def part(block: Bytes, start: int, stop: int) -> Iterator[memoryview]:
    """Of each head, rows of a block: in the order in which checksums take them."""
    return (table[start:stop].data for table in block)


def pieces_in(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, first row and end of the pieces that begin in `[start, stop)`."""
    row = 0
    for number, piece in enumerate(pieces):
        if start <= row < stop:
            yield number, row, row + piece.num_rows
        row += piece.num_rows
