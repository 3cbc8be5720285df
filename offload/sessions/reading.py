"""The rows of a link from disk: read ahead by a few threads, checked against their checksums, handed over layer by layer.

A checksum covers all layers, so rows are handed over before it is known whether they are sound; how many of them are is
told at the end. Reads are direct, into buffers that do not grow with the chain, and leave no page cache behind.

Threads: those that read live as long as one call of `read_link`; only the caller's thread calls `put`.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Final, NamedTuple

import numpy as np
from xxhash import xxh3_64

from offload.errors import AllocationError, StorageError
from offload.sessions.chain import Link
from offload.sessions.geometry import Bytes, Put, ranges
from offload.sessions.rows_file import part, pieces_in
from offload.tiers.files import File, Storage, read_exactly
from offload.units import PAGE, align_down, align_up

READERS: Final = 4
"""Requests in flight: a table of a short segment is a short read."""
_BUFFERS: Final = READERS + 2


class Sound(NamedTuple):
    """How many leading rows of a link are as they were written; and, where that is not all, why."""

    num_rows: int
    damage: str = ""


class _Block(NamedTuple):
    """Rows `[first, stop)` of a layer."""

    layer: int
    first: int
    stop: int


def read_link(storage: Storage, link: Link, put: Put) -> Sound:
    """Hands over all rows of a link, each block a view that lasts until `put` returns.

    Raises:
        StorageError: the file cannot be opened. AllocationError: no memory for the buffers.
    """
    with closing(storage.open(link.file.path)) as file, ThreadPoolExecutor(READERS, "offload-sessions") as pool:
        return _Reading(file, link, put, pool).run()


class _Reading:
    def __init__(self, file: File, link: Link, put: Put, pool: ThreadPoolExecutor) -> None:
        self._file, self._link, self._put, self._pool = file, link, put, pool
        self._pieces = list(pieces_in(link.record.pieces, 0, link.num_rows))
        self._hashes = [xxh3_64() for _ in self._pieces]
        self._limit = self._pieces[-1][2]  # the last piece is verified as a whole, though its end may not be wanted
        self._damage = ""
        self._flying: deque[tuple[_Block, mmap.mmap, Future[Bytes]]] = deque()
        geometry = link.record.geometry
        rows = min(geometry.block_rows, link.record.capacity)
        self._slot = align_up(rows * geometry.row_nbytes) + PAGE  # a run may begin and end within a page
        self._free = [_allocate(geometry.num_heads * self._slot) for _ in range(_BUFFERS)]

    def run(self) -> Sound:
        for block in self._blocks():
            if block.first < self._limit:
                if not self._free:
                    self._finish()
                buffer = self._free.pop()
                self._flying.append((block, buffer, self._pool.submit(self._read, block, buffer)))
        while self._flying:
            self._finish()
        return self._verdict()

    def _blocks(self) -> Iterator[_Block]:
        geometry, stop = self._link.record.geometry, self._limit
        for layer in range(geometry.num_layers):
            for first, end in ranges(0, stop, geometry.block_rows):
                yield _Block(layer, first, end)

    def _read(self, block: _Block, buffer: mmap.mmap) -> Bytes:
        record, memory = self._link.record, memoryview(buffer)
        geometry, num_rows = record.geometry, block.stop - block.first
        lead = 0
        for head in range(geometry.num_heads):
            offset = geometry.offset(record.capacity, block.layer, head, block.first)
            lead = offset - align_down(offset)  # the same for all heads: tables begin on a page
            needed = lead + num_rows * geometry.row_nbytes
            place = memory[head * self._slot : head * self._slot + align_up(needed)]
            read_exactly(self._file, place, offset - lead, needed)
        shape = (geometry.num_heads, num_rows, geometry.row_nbytes)
        rows: Bytes = np.ndarray(shape, np.uint8, buffer, lead, (self._slot, geometry.row_nbytes, 1))
        return rows

    def _finish(self) -> None:
        """Hands over the oldest block that is on its way."""
        block, buffer, reading = self._flying.popleft()
        try:
            rows = reading.result()
        except StorageError as error:  # what lies before is still wanted, of this layer and the next ones
            self._limit = min(self._limit, block.first)
            self._damage = reason(error)
        else:
            self._take(block, rows)
        self._free.append(buffer)

    def _take(self, block: _Block, rows: Bytes) -> None:
        for (_, first, stop), hashed in zip(self._pieces, self._hashes, strict=True):
            if block.first <= first < block.stop:
                for table in part(rows, first - block.first, stop - block.first):
                    hashed.update(table)
        used = self._link.num_rows - block.first
        if used > 0:
            self._put(block.layer, self._link.record.start + block.first, rows[:, :used])

    def _verdict(self) -> Sound:
        sound = 0
        for (number, first, stop), hashed in zip(self._pieces, self._hashes, strict=True):
            if first >= self._limit:
                return Sound(sound, self._damage)
            if hashed.hexdigest() != self._link.record.pieces[number].checksum:
                return Sound(sound, f"{self._file.path}: a checksum does not match")
            sound = min(stop, self._link.num_rows)
        return Sound(sound)


def reason(error: StorageError) -> str:
    """Of a failed read, without advice that is meant for model files."""
    return str(error).partition("; ")[0]


def _allocate(nbytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes)  # page-aligned, as direct reads want it
    except OSError as error:
        raise AllocationError(
            f"no memory for {nbytes} bytes to read a session through; close other programs or lower --ram",
            needed_bytes=nbytes,
        ) from error
