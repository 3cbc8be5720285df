"""Where every matrix is now: pinned for good, or passing through the ring. The one table that the scheduler asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import NamedTuple, Protocol

from offload.blocks import BlockKey, BlockSpec, Extent
from offload.kv_stream import TableStream
from offload.stream import Arrival
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken, Handle, Reader
from offload.tiers.ram import Slab

Place = Callable[[BlockKey, int], None]


class Stream(Protocol):
    """What brings the blocks that are not pinned: `BlockStream` to host RAM, `DeviceStream` to a device."""

    def fill(self) -> None: ...

    def acquire(self, key: BlockKey, cancel: CancelToken | None) -> Arrival: ...

    def release(self, count: int) -> None: ...

    def restart(self) -> None: ...

    def replace(self, keys: AbstractSet[BlockKey]) -> None: ...


class _Run(NamedTuple):
    """Blocks that follow each other in a file, read at once and kept as they lie there."""

    extent: Extent
    blocks: list[BlockSpec]

    @property
    def footprint(self) -> int:
        return sum(block.footprint for block in self.blocks)


def _runs(blocks: Sequence[BlockSpec]) -> list[_Run]:
    """The parts of a matrix become one run again, so that it can be computed at once."""
    runs: list[_Run] = []
    for block in blocks:
        assert block.extent is not None
        last = runs[-1] if runs else None
        if last is not None and _continues(last, block):
            extent = replace(last.extent, nbytes=last.extent.nbytes + block.extent.nbytes)
            runs[-1] = _Run(extent, [*last.blocks, block])
        else:
            runs.append(_Run(block.extent, [block]))
    return runs


def _continues(run: _Run, block: BlockSpec) -> bool:
    assert block.extent is not None
    same = run.blocks[-1].key._replace(part=0) == block.key._replace(part=0)
    return same and run.extent.path == block.extent.path and run.extent.end == block.extent.offset


class Residency:
    """Pinned blocks in one slab, streamed ones in the ring of `stream` (None when nothing is streamed).

    Tables of the KV cache pass through that of `tables`, whose keys are all of kind "kv".
    """

    def __init__(
        self, place: Place, stream: Stream | None, telemetry: Telemetry, tables: TableStream | None = None
    ) -> None:
        self._place = place
        self._stream = stream
        self._tables = tables
        self._telemetry = telemetry
        self._pinned: dict[BlockKey, int] = {}

    def pin(
        self,
        blocks: Sequence[BlockSpec],
        slab: Slab,
        reader: Reader,
        progress: Callable[[int, int], None] | None = None,
        offset: int = 0,
        cancel: CancelToken | None = None,
    ) -> None:
        """Reads `blocks` into `slab` from `offset` on, one after the other, and keeps them there.

        Raises:
            StorageError: a block could not be read. Cancelled: `cancel` was set; reads may still be in flight.
        """
        flights: list[tuple[_Run, Handle]] = []
        total = sum(block.footprint for block in blocks)
        for run in _runs(blocks):
            flights.append((run, reader.read_extent(run.extent, slab.view(offset, run.extent.window_nbytes))))
            for block in run.blocks:
                assert block.extent is not None
                self._pinned[block.key] = slab.address + offset + block.extent.offset - run.extent.window_offset
            offset += run.footprint
        done = 0
        for run, handle in flights:
            handle.wait(cancel)
            done += run.footprint
            for block in run.blocks:
                self._place(block.key, self._pinned[block.key])
            if progress is not None:
                progress(done, total)

    def unpin(self, blocks: Iterable[BlockSpec]) -> None:
        """Forgets where these blocks are; nobody computes with them before they arrive anew."""
        for block in blocks:
            self._pinned.pop(block.key, None)

    def stream(self, keys: AbstractSet[BlockKey]) -> None:
        """From now on these blocks are streamed, in the order in which the stream knew them from the start."""
        if self._stream is not None:
            self._stream.replace(keys)

    @property
    def pinned(self) -> Mapping[BlockKey, int]:
        """Where the first byte of every pinned block is."""
        return self._pinned

    def acquire(self, pinned: int, streamed: Sequence[BlockKey], cancel: CancelToken | None) -> None:
        """Waits for the streamed blocks of a piece and points the kernels at them. `pinned` others count as hits."""
        telemetry = self._telemetry
        telemetry.demands += pinned + len(streamed)
        telemetry.hits += pinned
        for key in streamed:
            source = self._tables if key.kind == "kv" else self._stream
            assert source is not None
            arrival = source.acquire(key, cancel)
            telemetry.hits += arrival.was_ready
            self._place(key, arrival.address)

    def release(self, streamed: Sequence[BlockKey]) -> None:
        """The piece has run; its streamed blocks may be overwritten."""
        for key in streamed:
            source = self._tables if key.kind == "kv" else self._stream
            assert source is not None
            source.release(1)

    def begin(self, start: int, stop: int) -> None:
        """A pass over positions `[start, stop)` begins.

        Raises:
            StorageError: what an earlier pass added to the cache could not be written.
        """
        if self._tables is not None:
            self._tables.begin(start, stop)

    def read_ahead(self) -> None:
        """Starts reading for the next pass."""
        if self._stream is not None:
            self._stream.fill()

    def restart(self) -> None:
        """Begins the streamed cycle anew, after a pass that did not end."""
        for source in (self._stream, self._tables):
            if source is not None:
                source.restart()
