"""Blocks that pass through a ring in a known cycle: read ahead as far as there is room, handed out in order.

    order      b0 b1 b2 ... bn-1 b0 b1 ...          the same in every pass, so reading never stops at a pass's end
    taken      ^ handed out by `acquire`, given back by `release`
    started          ^ reads in flight or done, ahead of use

Called from the driver thread; the reads run on the reader's workers. Reading starts in `acquire` and `release` only,
as soon as room appears, which keeps every free byte of the ring under a read without a thread of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from offload.blocks import BlockKey, BlockSpec
from offload.errors import WouldBlock
from offload.tiers.base import CancelToken, Handle, Reader
from offload.tiers.ram import Slab
from offload.tiers.ring import Region, RingAllocator


class _Flight(NamedTuple):
    block: BlockSpec
    region: Region
    handle: Handle


class Arrival(NamedTuple):
    """A block in the ring: where its first byte is, and whether it was there before it was asked for."""

    address: int
    was_ready: bool


class BlockStream:
    """See the module. `blocks` are all that may ever be streamed, in order of use; `slab` is the ring's memory."""

    def __init__(self, blocks: Sequence[BlockSpec], slab: Slab, reader: Reader) -> None:
        assert blocks, "an empty stream has nothing to read"
        self._all = tuple(blocks)
        self._blocks = self._all
        self._slab = slab
        self._reader = reader
        self._ring = RingAllocator(slab.nbytes)
        self._started = 0
        self._ahead: deque[_Flight] = deque()
        self._taken: deque[_Flight] = deque()

    def fill(self) -> None:
        """Starts reads until the ring is full."""
        while len(self._ahead) + len(self._taken) < len(self._blocks):
            block = self._blocks[self._started % len(self._blocks)]
            try:
                region = self._ring.try_allocate(block.footprint)
            except WouldBlock:
                return
            assert block.extent is not None
            handle = self._reader.read_extent(block.extent, self._slab.view(region.offset, block.footprint))
            self._ahead.append(_Flight(block, region, handle))
            self._started += 1

    def acquire(self, key: BlockKey, cancel: CancelToken | None) -> Arrival:
        """The next block of the cycle, which must be `key`, once its bytes are there.

        Raises:
            StorageError: it could not be read. Cancelled: `cancel` was set. `restart` before going on.
        """
        if not self._ahead:
            self.fill()
        flight = self._ahead[0]
        assert flight.block.key == key, f"stream is at {flight.block.key}, not at {key}"
        was_ready = flight.handle.done()
        flight.handle.wait(cancel)
        self._taken.append(self._ahead.popleft())
        extent = flight.block.extent
        assert extent is not None
        return Arrival(self._slab.address + flight.region.offset + extent.lead, was_ready)

    def is_ready(self) -> bool:
        """Whether `acquire` of the next block would return at once."""
        return bool(self._ahead) and self._ahead[0].handle.done()

    def acquire_view(self, key: BlockKey, cancel: CancelToken | None) -> memoryview:
        """`acquire`, as the block's bytes in the ring."""
        address = self.acquire(key, cancel).address
        return self._slab.view(address - self._slab.address, self._taken[-1].block.nbytes)

    def release(self, count: int) -> None:
        """Gives back the `count` blocks that were acquired first, and reads on into their room."""
        for _ in range(count):
            self._ring.release(self._taken.popleft().region.number)
        self.fill()

    def replace(self, keys: AbstractSet[BlockKey]) -> None:
        """Begins anew with a cycle of these blocks only."""
        self.restart()
        self._blocks = tuple(block for block in self._all if block.key in keys)

    def restart(self) -> None:
        """Forgets what is in flight and begins the cycle anew; after an error or a cancelled pass."""
        self._reader.cancel_pending()
        self._reader.drain()
        self._ahead.clear()
        self._taken.clear()
        self._ring.reset()
        self._started = 0
