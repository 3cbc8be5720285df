"""The plain reference: files that are bytes in memory, and a reader that has finished when it returns.

What the disk-backed classes do must be what these do. Used by tests and simulations; never by a run on real files.

Threads: as their disk-backed counterparts; `FakeStorage.write` belongs to the test's own thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from offload.blocks import Extent
from offload.errors import StorageError
from offload.results import EdgeUse
from offload.tiers.base import TIMEOUT_S, Group, TransferHandle
from offload.tiers.checked import check_inside, check_unchanged, open_all, read_checked
from offload.tiers.files import Storage


class FakeStorage:
    """Named byte strings. `write` changes or creates one, `remove` deletes it, under whoever has it open."""

    def __init__(self, contents: Mapping[Path, bytes] | None = None) -> None:
        self._contents = {path: (0, data) for path, data in (contents or {}).items()}

    def open(self, path: Path) -> FakeFile:
        if path not in self._contents:
            raise StorageError(f"{path}: cannot be opened: no such file; check the path", path=str(path))
        return FakeFile(self, path)

    def write(self, path: Path, data: bytes) -> None:
        version, _ = self._contents.get(path, (0, b""))
        self._contents[path] = (version + 1, data)

    def remove(self, path: Path) -> None:
        del self._contents[path]

    def current(self, path: Path) -> tuple[int, bytes] | None:
        """Version and bytes, None when removed."""
        return self._contents.get(path)


class FakeFile:
    """An open file of a `FakeStorage`, pinned to its version."""

    direct = False
    descriptor = None

    def __init__(self, storage: FakeStorage, path: Path) -> None:
        self.path = path
        self._storage = storage
        self._version, self._data = storage.current(path) or (0, b"")
        self.nbytes = len(self._data)

    def read_into(self, destination: memoryview, offset: int) -> int:
        current = self._storage.current(self.path)
        data = (self._data if current is None else current[1])[offset : offset + len(destination)]
        destination[: len(data)] = data
        return len(data)

    def changed(self) -> str | None:
        current = self._storage.current(self.path)
        if current is None:
            return "it was removed"
        version, data = current
        if len(data) != self.nbytes:
            return f"its size went from {self.nbytes} to {len(data)} bytes"
        return None if version == self._version else "it was written to"

    def close(self) -> None:
        pass


class MemoryReader:
    """`NvmeReader` without threads and pieces: every handle it returns has ended."""

    def __init__(self, storage: Storage, files: Sequence[Path]) -> None:
        self._files = open_all(storage, files)
        self._nbytes = 0

    def read_extent(self, extent: Extent, destination: memoryview) -> TransferHandle:
        return self._read_group([(extent, destination)])

    def _read_group(self, group: Group) -> TransferHandle:
        wanted = [(extent, destination) for extent, destination in group if extent.nbytes]
        for extent, destination in wanted:
            assert len(destination) >= extent.window_nbytes, (len(destination), extent)
            check_inside(self._files[extent.path], extent)
        handle = TransferHandle(pieces=len(wanted), nbytes=sum(extent.window_nbytes for extent, _ in wanted))
        for extent, destination in wanted:
            self._read(extent, destination, handle)
        return handle

    def _read(self, extent: Extent, destination: memoryview, handle: TransferHandle) -> None:
        file = self._files[extent.path]
        try:
            window = destination[: extent.window_nbytes]
            read_checked(file, window, extent.window_offset, extent.lead + extent.nbytes)
        except StorageError as error:
            handle.fail(error)
        else:
            handle.complete(extent.window_nbytes)
            self._nbytes += extent.window_nbytes

    def read_groups(self, groups: Sequence[Group], *, background: bool = False) -> list[TransferHandle]:
        del background
        return [self._read_group(group) for group in groups]

    def promote(self, handles: Iterable[TransferHandle]) -> None:
        pass

    def drop(self, handles: Iterable[TransferHandle]) -> None:
        pass

    def cancel_pending(self) -> int:
        return 0

    def drain(self, timeout_s: float = TIMEOUT_S) -> None:
        pass

    def check_files(self) -> None:
        for file in self._files.values():
            check_unchanged(file)

    def statistics(self) -> EdgeUse:
        return EdgeUse(bytes=self._nbytes, busy_s=0.0)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
