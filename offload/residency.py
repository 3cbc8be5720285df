"""Where every matrix is now: pinned for good, or passing through the ring. The one table that the scheduler asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from offload.blocks import BlockKey, BlockSpec
from offload.stream import Arrival
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken, Handle, Reader
from offload.tiers.ram import Slab

Place = Callable[[str, int], None]


class Stream(Protocol):
    """What brings the blocks that are not pinned: `BlockStream` to host RAM, `DeviceStream` to a device."""

    def fill(self) -> None: ...

    def acquire(self, key: BlockKey, cancel: CancelToken | None) -> Arrival: ...

    def release(self, count: int) -> None: ...

    def restart(self) -> None: ...


class Residency:
    """Pinned blocks in one slab, streamed ones in the ring of `stream` (None when nothing is streamed)."""

    def __init__(self, place: Place, stream: Stream | None, telemetry: Telemetry) -> None:
        self._place = place
        self._stream = stream
        self._telemetry = telemetry
        self._pinned: dict[BlockKey, int] = {}

    def pin(
        self,
        blocks: Sequence[BlockSpec],
        slab: Slab,
        reader: Reader,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Reads `blocks` into `slab`, one after the other, and keeps them there.

        Raises:
            StorageError: a block could not be read.
        """
        flights: list[tuple[BlockSpec, Handle]] = []
        offset = 0
        for block in blocks:
            assert block.extent is not None
            flights.append((block, reader.read_extent(block.extent, slab.view(offset, block.footprint))))
            self._pinned[block.key] = slab.address + offset + block.extent.lead
            offset += block.footprint
        done = 0
        for block, handle in flights:
            handle.wait()
            done += block.footprint
            self._place(block.key.name, self._pinned[block.key])
            if progress is not None:
                progress(done, offset)

    def address(self, key: BlockKey) -> int | None:
        """Where a pinned block's first byte is; None for a block that is not pinned."""
        return self._pinned.get(key)

    @property
    def pinned(self) -> Mapping[BlockKey, int]:
        return self._pinned

    def acquire(self, pinned: int, streamed: Sequence[BlockKey], cancel: CancelToken | None) -> None:
        """Waits for the streamed blocks of a segment and points the kernels at them. `pinned` others count as hits."""
        telemetry = self._telemetry
        telemetry.demands += pinned + len(streamed)
        telemetry.hits += pinned
        for key in streamed:
            assert self._stream is not None
            arrival = self._stream.acquire(key, cancel)
            telemetry.hits += arrival.was_ready
            self._place(key.name, arrival.address)

    def release(self, streamed: Sequence[BlockKey]) -> None:
        """The segment has run; its streamed blocks may be overwritten."""
        if streamed:
            assert self._stream is not None
            self._stream.release(len(streamed))

    def read_ahead(self) -> None:
        """Starts reading for the next pass."""
        if self._stream is not None:
            self._stream.fill()

    def restart(self) -> None:
        """Begins the streamed cycle anew, after a pass that did not end."""
        if self._stream is not None:
            self._stream.restart()
