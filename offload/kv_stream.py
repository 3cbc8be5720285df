"""Tables of the KV cache that memory does not hold: they pass through a ring from disk, and what a pass adds goes back.

    file    [ table 0: rows .......  | table 1: rows ....... | ... ]      whole buckets of 256 positions
    tails   [ last bucket of table 0 | of table 1 | ... ]                 until it is full
    ring    [ table i | table i + 1 | .. ]                                rows of the file, the tail behind them

A table is one head of one layer. Attention needs all of it, in the same order in every pass, so reading runs ahead, into the
next token, as for weights. What a pass computes does not depend on where tables lie: kernels see the same rows in one run.
As heads are computed apart, nothing has to be merged (HeadInfer, arXiv 2502.12574).

Called from the driver thread; reads run on the reader's workers, writes on the file's thread. No write is waited for before
its place in the ring is needed.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from offload.blocks import BlockKey, Extent
from offload.errors import OffloadError, WouldBlock
from offload.stream import Arrival
from offload.tiers.base import CancelToken, Handle, Reader, TransferHandle
from offload.tiers.ram import Slab
from offload.tiers.ring import Region, RingAllocator
from offload.tiers.spill import SpillFile


class TableLayout(NamedTuple):
    """Sizes of the tables.

    Attributes:
        num_tables: how many there are. buckets: that fit into each. bucket_tokens, bucket_nbytes: of one; whole pages.
    """

    num_tables: int
    buckets: int
    bucket_tokens: int
    bucket_nbytes: int

    @property
    def row_nbytes(self) -> int:
        return self.bucket_nbytes // self.bucket_tokens

    @property
    def tails_nbytes(self) -> int:
        """Memory for the last bucket of each."""
        return self.num_tables * self.bucket_nbytes

    def buckets_of(self, tokens: int) -> int:
        """Buckets that hold so many positions."""
        return max(1, -(-tokens // self.bucket_tokens))


class _Flight(NamedTuple):
    """A table in the ring, and the reads that bring its rows."""

    table: int
    region: Region
    handle: Handle


class _Leaving(NamedTuple):
    """A region from which a table's buckets are being written."""

    table: int
    region: Region
    handle: TransferHandle


class TableStream:
    """See the module.

    Args:
        keys: of the tables, in order of use. tails: memory of `layout.tails_nbytes`.
        ring: memory of at least one whole table, of as many as are to be on their way.
        reader: of `file`.
    """

    def __init__(
        self, keys: Sequence[BlockKey], layout: TableLayout, tails: Slab, ring: Slab, file: SpillFile, reader: Reader
    ) -> None:
        self._tables = {key: number for number, key in enumerate(keys)}
        self._layout = layout
        self._tails = tails
        self._memory = ring
        self._file = file
        self._reader = reader
        self._ring = RingAllocator(ring.nbytes // layout.bucket_nbytes * layout.bucket_nbytes)
        self._whole = [0] * layout.num_tables  # buckets of each that the file holds, from 0 on
        self._positions = range(0)  # of the pass at hand
        self._started = 0
        self._ahead: deque[_Flight] = deque()
        self._taken: deque[_Flight] = deque()
        self._leaving: deque[_Leaving] = deque()
        self._failure: Exception | None = None

    def begin(self, start: int, stop: int) -> None:
        """A pass over positions `[start, stop)` begins; what was cached from `start` on is forgotten.

        Raises:
            StorageError: what an earlier pass added could not be written.
        """
        assert stop <= self._layout.buckets * self._layout.bucket_tokens, (stop, self._layout)
        expected = self._positions.stop
        self._positions = range(start, stop)
        self._started = len(self._ahead)
        room = self._layout.buckets_of(stop) * self._layout.bucket_nbytes
        if start != expected or any(flight.region.nbytes < room for flight in self._ahead):
            self.restart()
        self.fill()

    def fill(self) -> None:
        """Starts reads until the ring is full."""
        self._reap()
        while len(self._ahead) + len(self._taken) < self._layout.num_tables and self._start_next():
            pass

    def acquire(self, key: BlockKey, cancel: CancelToken | None) -> Arrival:
        """The next table, which must be this one: its rows before those of the pass, and room for these.

        Raises:
            StorageError: it could not be read, or what was in its place not written. Cancelled. `restart` before going on.
        """
        while not self._ahead:
            if not self._start_next():
                assert self._leaving, "the ring is smaller than a table"
                self._leaving[0].handle.wait(cancel)
                self._reap()
        flight = self._ahead[0]
        assert flight.table == self._tables[key], f"the cache's stream is at table {flight.table}, not at {key}"
        was_ready = flight.handle.done()
        flight.handle.wait(cancel)
        self._taken.append(self._ahead.popleft())
        self._add_tail(flight)
        self.fill()
        return Arrival(self._memory.address + flight.region.offset, was_ready)

    def release(self, count: int) -> None:
        """The tables that were acquired first have the pass's rows: keeps them, and reads on into their room."""
        for _ in range(count):
            flight = self._taken.popleft()
            self._keep(flight.table, flight.region)
        self.fill()

    def _keep(self, table: int, region: Region) -> None:
        layout, positions = self._layout, self._positions
        first, whole = positions.start // layout.bucket_tokens, positions.stop // layout.bucket_tokens
        rest = positions.stop - whole * layout.bucket_tokens
        if rest:
            start = region.offset + whole * layout.bucket_nbytes
            ctypes.memmove(self._tail(table), self._memory.address + start, rest * layout.row_nbytes)
        self._whole[table] = whole
        if whole > first:
            begin, nbytes = first * layout.bucket_nbytes, (whole - first) * layout.bucket_nbytes
            source = self._memory.view(region.offset + begin, nbytes)
            self._leaving.append(_Leaving(table, region, self._file.start_write(self._place(table) + begin, source)))
        else:
            self._ring.release(region.number)

    def restart(self) -> None:
        """Forgets what is on its way, and begins with the first table; what was released stays."""
        self._reader.cancel_pending()
        self._reader.drain()
        for leaving in self._leaving:
            with suppress(OffloadError):  # kept until a pass begins
                leaving.handle.wait()
            self._failure = self._failure or leaving.handle.error
        self._leaving.clear()
        self._ahead.clear()
        self._taken.clear()
        self._ring.reset()
        self._started = 0

    def _add_tail(self, flight: _Flight) -> None:
        layout, whole = self._layout, self._whole[flight.table]
        rows = self._positions.start - whole * layout.bucket_tokens
        if rows > 0:
            target = self._memory.address + flight.region.offset + whole * layout.bucket_nbytes
            ctypes.memmove(target, self._tail(flight.table), rows * layout.row_nbytes)

    def _start_next(self) -> bool:
        """Starts reading the next table; False while the ring is full, or its rows are still being written."""
        layout = self._layout
        lap, table = divmod(self._started, layout.num_tables)
        start = self._positions.stop if lap else self._positions.start
        stop = max(self._positions.stop, start + 1)
        if any(leaving.table == table for leaving in self._leaving):
            return False
        buckets = min(layout.buckets_of(stop), layout.buckets)
        try:
            region = self._ring.try_allocate(buckets * layout.bucket_nbytes)
        except WouldBlock:
            return False
        known = min(self._whole[table], -(-start // layout.bucket_tokens))
        handle: Handle = TransferHandle.completed()
        if known:
            extent = Extent(path=self._file.path, offset=self._place(table), nbytes=known * layout.bucket_nbytes)
            handle = self._reader.read_extent(extent, self._memory.view(region.offset, extent.nbytes))
        self._ahead.append(_Flight(table, region, handle))
        self._started += 1
        return True

    def _reap(self) -> None:
        """Gives back what has been written."""
        while self._leaving and self._leaving[0].handle.done():
            leaving = self._leaving.popleft()
            self._failure = self._failure or leaving.handle.error
            self._ring.release(leaving.region.number)
        if self._failure is not None:
            raise self._failure

    def _place(self, table: int) -> int:
        return table * self._layout.buckets * self._layout.bucket_nbytes

    def _tail(self, table: int) -> int:
        return self._tails.address + table * self._layout.bucket_nbytes
