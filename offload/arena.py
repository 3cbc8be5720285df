"""Fills the arena of a device with what stays there: through host memory, or straight from disk where that is no slower.

Which of the two is found out on the first matrices themselves, so that the trial reads nothing twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import accumulate
from typing import Any, Final, NamedTuple, Protocol

from offload.blocks import BlockSpec, Extent
from offload.errors import OffloadError, StorageError
from offload.tiers.base import Handle
from offload.tiers.direct import DirectReader
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import Slab
from offload.units import MIB, align_down, format_rate

_LOG: Final = logging.getLogger("offload")
STAGING_BYTES: Final = 16 * MIB  # of each of two buffers
TRIAL_BYTES: Final = 256 * MIB  # each way


class Arena(Protocol):
    """Device memory; `tiers.vram.DeviceTier` is one."""

    def copy_in(self, source: memoryview, offset: int) -> Handle: ...

    def view(self, offset: int, nbytes: int) -> Any: ...


class Placed(NamedTuple):
    """A matrix and its offset in the arena."""

    block: BlockSpec
    offset: int

    @property
    def extent(self) -> Extent:
        assert self.block.extent is not None
        return self.block.extent


class _Piece(NamedTuple):
    extent: Extent
    offset: int


Register = Callable[[Slab], Callable[[], None] | None]
"""Registers host memory with the device and returns what undoes that."""


def fill_arena(
    placed: Sequence[Placed], arena: Arena, reader: NvmeReader, direct: DirectReader | None, register: Register
) -> None:
    """Reads all of `placed`.

    Args:
        direct: reads straight from disk; None where that cannot be, or where files are not read from disk as they are.

    Raises:
        StorageError: a read failed.
        DeviceError: the device has failed.
    """
    if not placed:
        return
    nbytes = min(STAGING_BYTES, max(one.block.footprint for one in placed))
    with ExitStack() as stack:
        if direct is not None:
            stack.callback(direct.close)
        staging = [_staging(nbytes, register, stack) for _ in range(2)]
        rest = placed if direct is None else _try_direct(placed, arena, reader, direct, staging)
        _through_host(rest, arena, reader, staging)


def _staging(nbytes: int, register: Register, stack: ExitStack) -> Slab:
    slab = Slab(nbytes, prefault=False)
    stack.callback(slab.close)
    undo = register(slab)
    if undo is not None:
        stack.callback(undo)
    return slab


def _try_direct(
    placed: Sequence[Placed], arena: Arena, reader: NvmeReader, direct: DirectReader, staging: Sequence[Slab]
) -> Sequence[Placed]:
    """Tries direct reads and, where the disk does not write into the card itself, compares; returns what is left to do."""
    first, rest = placed[:1], placed[1:]
    trial, rest = _share(rest)
    try:
        _straight(first, arena, direct)  # opens the file, starts threads
        direct_bps = _timed(trial, lambda: _straight(trial, arena, direct))
    except StorageError as error:
        _LOG.info("weights reach the device through host memory: %s", error)
        return placed  # a disk that fails does so again, and then it is an error
    if direct.mode == "compat" and rest:
        trial, rest = _share(rest)
        host_bps = _timed(trial, lambda: _through_host(trial, arena, reader, staging))
        if direct_bps < host_bps:
            rates = format_rate(direct_bps), format_rate(host_bps)
            _LOG.info("weights reach the device through host memory: kvikio reads %s, the ring %s", *rates)
            return rest
    _straight(rest, arena, direct)
    return ()


def _share(placed: Sequence[Placed]) -> tuple[Sequence[Placed], Sequence[Placed]]:
    """What a trial takes, and the rest."""
    before = accumulate((one.block.nbytes for one in placed), initial=0)
    count = sum(nbytes < TRIAL_BYTES for nbytes in list(before)[:-1])
    return placed[:count], placed[count:]


def _timed(placed: Sequence[Placed], work: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    work()
    return sum(one.block.nbytes for one in placed) / max(time.perf_counter() - start_s, 1e-9)


def _straight(placed: Sequence[Placed], arena: Arena, direct: DirectReader) -> None:
    direct.read((one.extent, arena.view(one.offset, one.block.nbytes)) for one in placed)


def _through_host(placed: Sequence[Placed], arena: Arena, reader: NvmeReader, staging: Sequence[Slab]) -> None:
    """The next piece is read into one buffer while the other is copied."""
    pieces = [piece for one in placed for piece in _pieces(one, staging[0].nbytes)]
    reads: list[Handle] = []
    copies: list[Handle] = []
    try:
        for number, piece in enumerate(pieces):
            for ahead in range(len(reads), min(number + 2, len(pieces))):
                if ahead >= 2:
                    copies[ahead - 2].wait()  # it has left the buffer
                extent = pieces[ahead].extent
                reads.append(reader.read_extent(extent, staging[ahead % 2].view(0, extent.window_nbytes)))
            reads[number].wait()
            source = staging[number % 2].view(piece.extent.lead, piece.extent.nbytes)
            copies.append(arena.copy_in(source, piece.offset))
        for copy in copies[-2:]:
            copy.wait()
    except OffloadError:
        for handle in (*reads[-2:], *copies[-2:]):  # the buffers go when nothing moves in them any more
            with suppress(OffloadError):
                handle.wait()
        raise


def _pieces(one: Placed, nbytes: int) -> Iterator[_Piece]:
    """A matrix in pieces whose windows fit into `nbytes`; all but the first begin on a page of the file."""
    extent = one.extent
    start = extent.offset
    while start < extent.end:
        stop = min(align_down(start) + nbytes, extent.end)
        yield _Piece(Extent(path=extent.path, offset=start, nbytes=stop - start), one.offset + start - extent.offset)
        start = stop
