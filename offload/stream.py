"""Blocks that pass through a ring in a known cycle: read ahead as far as there is room, handed out in order.

    order      b0 b1 b2 ... bn-1 b0 b1 ...          the same in every pass, so reading never stops at a pass's end
    taken      ^ handed out by `acquire`, given back by `release`
    started          ^ reads in flight or done, ahead of use

Called from the driver thread; the reads run on the reader's workers. They are started by a thread of the stream's own, as
soon as room appears: that takes 50 us, which pass beside a kernel instead of between two.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from queue import SimpleQueue
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
        self._slab = slab
        self._reader = reader
        self._lock = threading.Lock()
        # guarded by the lock: the driver hands out and gives back, the filler starts reads
        self._blocks = self._all
        self._ring = RingAllocator(slab.nbytes)
        self._started = 0
        self._ahead: deque[_Flight] = deque()
        self._taken: deque[_Flight] = deque()
        self._failure: Exception | None = None
        self._room: SimpleQueue[bool] = SimpleQueue()
        self._filler = threading.Thread(target=self._serve, name="offload-filler", daemon=True)
        self._filler.start()

    def fill(self) -> None:
        """Lets reads be started until the ring is full; returns at once."""
        self._room.put(True)

    def acquire(self, key: BlockKey, cancel: CancelToken | None) -> Arrival:
        """The next block of the cycle, which must be `key`, once its bytes are there.

        Raises:
            StorageError: it could not be read. Cancelled: `cancel` was set. `restart` before going on.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if not self._ahead:
                self._start_reads()
            flight = self._ahead[0]
        assert flight.block.key == key, f"stream is at {flight.block.key}, not at {key}"
        was_ready = flight.handle.done()
        flight.handle.wait(cancel)
        with self._lock:
            self._taken.append(self._ahead.popleft())
        extent = flight.block.extent
        assert extent is not None
        return Arrival(self._slab.address + flight.region.offset + extent.lead, was_ready)

    def is_ready(self) -> bool:
        """Whether `acquire` of the next block would return at once."""
        with self._lock:
            return bool(self._ahead) and self._ahead[0].handle.done()

    def acquire_view(self, key: BlockKey, cancel: CancelToken | None) -> memoryview:
        """`acquire`, as the block's bytes in the ring."""
        address = self.acquire(key, cancel).address
        return self._slab.view(address - self._slab.address, self._taken[-1].block.nbytes)

    def release(self, count: int) -> None:
        """Gives back the `count` blocks that were acquired first; reading goes on into their room."""
        with self._lock:
            for _ in range(count):
                self._ring.release(self._taken.popleft().region.number)
        self.fill()

    def replace(self, keys: AbstractSet[BlockKey]) -> None:
        """Begins anew with a cycle of these blocks only."""
        with self._lock:
            self._forget()
            self._blocks = tuple(block for block in self._all if block.key in keys)

    def restart(self) -> None:
        """Forgets what is in flight and begins the cycle anew; after an error or a cancelled pass."""
        with self._lock:
            self._forget()

    def close(self) -> None:
        """Starts no more reads. Idempotent. Those in flight are the reader's."""
        self._room.put(False)
        self._filler.join()

    def _serve(self) -> None:
        while self._room.get():
            with self._lock:
                try:
                    self._start_reads()
                except Exception as error:  # raised where the next block is asked for
                    self._failure = error

    # under the lock

    def _forget(self) -> None:
        self._reader.cancel_pending()
        self._reader.drain()
        self._ahead.clear()
        self._taken.clear()
        self._ring.reset()
        self._started = 0
        self._failure = None

    def _start_reads(self) -> None:
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
