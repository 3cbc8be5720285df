"""Blocks that pass through the device's ring, from host memory: pinned there, or itself streamed from disk.

The cycle is that of `BlockStream`, one tier up. A copy starts as soon as its source is there and the ring has room; where
the source comes through the host's ring, its room is given back when the copy has ended.

Called from the driver thread; copies run on the device's copy stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import NamedTuple, Protocol

from offload.blocks import BlockKey, BlockSpec
from offload.errors import OffloadError, WouldBlock
from offload.stream import Arrival, BlockStream
from offload.tiers.base import CancelToken, Handle
from offload.tiers.ring import Region, RingAllocator


class Arena(Protocol):
    """Device memory that is filled from host memory; `tiers.vram.DeviceTier` is one."""

    def copy_in(self, source: memoryview, offset: int) -> Handle:
        """Starts copying `source` to `offset`."""
        ...


class _Copy(NamedTuple):
    block: BlockSpec
    region: Region
    handle: Handle


class DeviceStream:
    """See the module.

    Args:
        blocks: in order of use.
        tier: the device's arena, whose `[base, base + nbytes)` is the ring.
        pinned: the bytes of blocks that are pinned in host memory; all others come through `stream`, in order.
    """

    def __init__(
        self, blocks: Sequence[BlockSpec], tier: Arena, base: int, nbytes: int,
        pinned: Mapping[BlockKey, memoryview], stream: BlockStream | None,
    ) -> None:  # fmt: skip
        assert blocks, "an empty stream has nothing to copy"
        self._all = tuple(blocks)
        self._nbytes: Mapping[BlockKey, int] = {}
        self._blocks = self._all
        self._tier = tier
        self._base = base
        self._pinned = pinned
        self._stream = stream
        self._ring = RingAllocator(nbytes)
        self._started = 0
        self._ahead: deque[_Copy] = deque()
        self._taken: deque[_Copy] = deque()
        self._unsettled: deque[Handle] = deque()  # copies out of the host's ring that may still read it

    def fill(self) -> None:
        """Starts the copies whose source is there, until the ring is full."""
        if self._stream is not None:
            self._stream.fill()
        self._settle()
        while self._has_next and self._start_next(None, wait=False):
            pass

    def acquire(self, key: BlockKey, cancel: CancelToken | None) -> Arrival:
        """The next block of the cycle, which must be `key`; `address` is its offset in the arena.

        Raises:
            StorageError, Cancelled: it did not arrive. `restart` before going on.
        """
        if not self._ahead:
            started = self._start_next(cancel, wait=True)
            assert started, "the device's ring is smaller than a stage"
        copy = self._ahead[0]
        assert copy.block.key == key, f"device stream is at {copy.block.key}, not at {key}"
        was_ready = copy.handle.done()
        copy.handle.wait(cancel)
        self._taken.append(self._ahead.popleft())
        self.fill()
        return Arrival(self._base + copy.region.offset, was_ready)

    def release(self, count: int) -> None:
        """Gives back the `count` blocks that were acquired first, and copies on into their room."""
        for _ in range(count):
            self._ring.release(self._taken.popleft().region.number)
        self.fill()

    def restart(self) -> None:
        """Forgets what is in flight and begins the cycle anew."""
        for copy in self._ahead:
            with suppress(OffloadError):  # what has become of it is nobody's business any more
                copy.handle.wait()
        self._ahead.clear()
        self._taken.clear()
        self._unsettled.clear()
        self._ring.reset()
        self._started = 0
        if self._stream is not None:
            self._stream.restart()

    def replace(self, keys: AbstractSet[BlockKey]) -> None:
        """Begins anew with a cycle of these blocks only."""
        self.restart()
        self._blocks = tuple(block for block in self._all if block.key in keys)
        if self._stream is not None:
            self._stream.replace(keys)

    def shorten(self, nbytes: Mapping[BlockKey, int]) -> None:
        """Begins anew; from now on, only so many leading bytes of these blocks cross. Pinned ones."""
        assert nbytes.keys() <= self._pinned.keys(), "what passes through the host's ring is not cut"
        self.restart()
        self._nbytes = nbytes

    @property
    def _has_next(self) -> bool:
        return len(self._ahead) + len(self._taken) < len(self._blocks)

    def _start_next(self, cancel: CancelToken | None, *, wait: bool) -> bool:
        """Starts the next copy; False when the ring is full or, without `wait`, its source is not there yet."""
        block = self._blocks[self._started % len(self._blocks)]
        pinned = self._pinned.get(block.key)
        if pinned is None and not wait and not self._source_ready():
            return False
        nbytes = self._nbytes.get(block.key, block.nbytes)
        try:
            region = self._ring.try_allocate(nbytes)
        except WouldBlock:
            return False
        source = self._from_ring(block, cancel) if pinned is None else pinned[:nbytes]
        handle = self._tier.copy_in(source, self._base + region.offset)
        if pinned is None:
            self._unsettled.append(handle)
        self._ahead.append(_Copy(block, region, handle))
        self._started += 1
        self._settle()
        return True

    def _source_ready(self) -> bool:
        return self._stream is not None and self._stream.is_ready()

    def _from_ring(self, block: BlockSpec, cancel: CancelToken | None) -> memoryview:
        assert self._stream is not None, f"{block.key} is neither pinned nor streamed"
        # while it is not there: the host's ring may be full of blocks that are being copied
        while self._unsettled and not self._source_ready():
            self._unsettled[0].wait(cancel)
            self._settle()
        return self._stream.acquire_view(block.key, cancel)

    def _settle(self) -> None:
        """Gives back the host's ring what has been copied out of it."""
        while self._unsettled and self._unsettled[0].done():
            self._unsettled.popleft()
            assert self._stream is not None
            self._stream.release(1)
