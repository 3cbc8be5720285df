"""The NVMe tier: reads extents of files by direct I/O into memory that the caller owns.

An extent is read as its page-aligned window, in pieces. Knows files and byte ranges, not what they mean or who uses them.

Threads: all but `close`, which is the owner's, may be called from any thread; a handle ends on a thread of the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from offload.blocks import Extent
from offload.config import READ_BYTES
from offload.results import EdgeUse
from offload.tiers.base import TIMEOUT_S, Group, OnRead, TransferHandle
from offload.tiers.checked import check_inside, check_unchanged, open_all
from offload.tiers.engines import make_engine
from offload.tiers.files import File, Storage
from offload.tiers.requests import Piece, RequestQueue
from offload.units import PAGE


class NvmeReader:
    """Reads extents of `files` with `workers` requests in flight, each of at most `read_bytes`.

    Args:
        storage: opens the files; all are pinned to what they are now.
        on_read: called on the engine's thread after each request.

    Raises:
        StorageError: a file cannot be opened.
    """

    def __init__(
        self,
        storage: Storage,
        files: Sequence[Path],
        workers: int,
        read_bytes: int = READ_BYTES,
        on_read: OnRead | None = None,
    ) -> None:
        assert workers > 0 and read_bytes > 0 and read_bytes % PAGE == 0, (workers, read_bytes)
        self._files = open_all(storage, files)
        self._read_bytes = read_bytes
        self._queue = RequestQueue()
        self._engine = make_engine(self._queue, list(self._files.values()), workers, on_read)

    def read_extent(self, extent: Extent, destination: memoryview) -> TransferHandle:
        """Starts reading the extent's window; its bytes will be at `destination[extent.lead:]`.

        Args:
            destination: writable, page-aligned, at least `extent.window_nbytes` long; not to be touched before the handle
                has ended. What follows the extent in it is undefined.

        Raises:
            StorageError: the file ends before the extent does.
            ClosedError: the reader is closed.
        """
        return self.read_groups([[(extent, destination)]])[0]

    def read_groups(self, groups: Sequence[Group], *, background: bool = False) -> list[TransferHandle]:
        """Starts several transfers in one submission, each of some extents, as `read_extent` does.

        `background`: they start when there is nothing else to read.
        """
        handles: list[TransferHandle] = []
        pieces: list[Piece] = []
        for group in groups:
            wanted = [(extent, destination) for extent, destination in group if extent.nbytes]
            count = sum(-(-extent.window_nbytes // self._read_bytes) for extent, _ in wanted)
            handle = TransferHandle(pieces=count, nbytes=sum(extent.window_nbytes for extent, _ in wanted))
            for extent, destination in wanted:
                pieces += self._split(extent, destination, handle)
            handles.append(handle)
        self._queue.put(pieces, background=background)
        self._engine.kick()
        return handles

    def promote(self, handles: Iterable[TransferHandle]) -> None:
        """Background reads that are needed now: what has not started of them is next."""
        if self._queue.promote(handles):
            self._engine.kick()

    def drop(self, handles: Iterable[TransferHandle]) -> None:
        """Background reads that nobody needs: what has not started of them never will, and they end with Cancelled."""
        self._queue.drop(handles)

    def cancel_pending(self) -> int:
        """Drops the pieces that have not started and tells how many; their handles end with Cancelled."""
        return self._queue.cancel_pending()

    def drain(self, timeout_s: float = TIMEOUT_S) -> None:
        """Returns when nothing is queued or in flight.

        Raises:
            StorageError: no request ended for `timeout_s`.
        """
        self._queue.drain(timeout_s)

    def file(self, path: Path) -> File:
        """One of the files, for who reads it in another way."""
        return self._files[path]

    def check_files(self) -> None:
        """
        Raises:
            StorageError: a file is no longer the one that was opened.
        """
        for file in self._files.values():
            check_unchanged(file)

    def statistics(self) -> EdgeUse:
        """Bytes that arrived and the time with a request in flight, up to now."""
        return self._queue.statistics()

    def close(self) -> None:
        """Drops what has not started, waits for what has, ends the engine, closes the files. Idempotent.

        Raises:
            StorageError: a request hangs; its file stays open.
        """
        self._queue.close()
        if not self._engine.join(TIMEOUT_S):
            raise self._queue.hangs(TIMEOUT_S)
        for file in self._files.values():
            file.close()

    def _split(self, extent: Extent, destination: memoryview, handle: TransferHandle) -> list[Piece]:
        file, window, step = self._files[extent.path], extent.window_nbytes, self._read_bytes
        assert len(destination) >= window, (len(destination), extent)
        check_inside(file, extent)
        if window <= step:
            return [Piece(file, extent.window_offset, destination[:window], extent.lead + extent.nbytes, handle)]
        pieces = []
        for start in range(0, window, step):
            stop = min(start + step, window)
            offset = extent.window_offset + start
            needed = min(extent.end - offset, stop - start)
            pieces.append(Piece(file, offset, destination[start:stop], needed, handle))
        return pieces
