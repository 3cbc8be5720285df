"""How fast the edges of this machine are: the disk at several sizes and depths, and host memory.

Measures with the engine's own reader and buffers, so that a figure is what a run can reach. Caches nothing.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from offload.blocks import Extent
from offload.config import READ_BYTES, READ_WORKERS
from offload.errors import StorageError
from offload.tiers.base import TransferHandle
from offload.tiers.files import LocalStorage, Storage
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import Slab
from offload.units import KIB, MIB, align_down

SIZES: Final = (128 * KIB, 1 * MIB, 2 * MIB, 8 * MIB)
DEPTHS: Final = (1, 2, 4, 8)
LEAST_FILE_BYTES: Final = (
    64 * MIB
)  # below that, the first read of a file and the disk's own cache tell more than the disk
FILE_BYTES: Final = 512 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPoint:
    """Direct reads of `read_bytes` with `depth` in flight."""

    read_bytes: int
    depth: int
    bandwidth_bps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskReport:
    """A disk at every size and depth. `direct` is False where the file system refuses direct I/O."""

    path: Path
    direct: bool
    points: tuple[DiskPoint, ...]

    @property
    def best(self) -> DiskPoint:
        return max(self.points, key=lambda point: point.bandwidth_bps)


def measure_disk(
    path: Path,
    *,
    seconds: float = 2.0,
    read_bytes: int = READ_BYTES,
    workers: int = READ_WORKERS,
    storage: Storage | None = None,
) -> float:
    """Bytes per second of direct reads of `path`, at aligned offsets in random order, into huge pages.

    The first pass over the file visits every place once; a file smaller than memory behind the disk's own cache can look
    faster than the disk.

    Raises:
        StorageError: the file cannot be read, or is empty.
        AllocationError: no memory for the buffers.
    """
    reader = NvmeReader(storage or LocalStorage(), [path], workers, read_bytes)
    try:
        return _drive(reader, path, seconds, read_bytes, 2 * workers)
    finally:
        reader.close()


def is_measurable(path: Path) -> bool:
    """Whether a regular file is large enough to tell the speed of its disk, and stored as a whole: holes cost nothing."""
    status = path.stat()
    stored = getattr(status, "st_blocks", status.st_size // 512) * 512
    return status.st_size >= LEAST_FILE_BYTES and stored >= status.st_size // 2


def probe_disk(path: Path, *, seconds: float = 0.25) -> DiskReport:
    """The table of sizes and depths, `seconds` for each point. A folder is probed with a temporary file of 512 MiB.

    Raises:
        StorageError: unreadable, or the folder has no room for the file.
    """
    if path.is_dir():
        with _temporary_file(path) as file:
            return replace(probe_disk(file, seconds=seconds), path=path)
    opened = LocalStorage().open(path)
    opened.close()
    points = (
        DiskPoint(
            read_bytes=size,
            depth=depth,
            bandwidth_bps=measure_disk(path, seconds=seconds, read_bytes=size, workers=depth),
        )
        for size in SIZES
        for depth in DEPTHS
    )
    return DiskReport(path=path, direct=opened.direct, points=tuple(points))


def measure_ram(nbytes: int = 256 * MIB, *, threads: int | None = None) -> float:
    """Bytes per second at which `threads` cores (None: all of this process) read a slab of `nbytes`: best of three.

    Raises:
        AllocationError: no memory for the slab.
    """
    threads = threads or _usable_cores()
    slab = Slab(nbytes)
    try:
        parts = np.array_split(np.frombuffer(slab.view(0, slab.nbytes), dtype=np.int64), threads)
        with ThreadPoolExecutor(threads, thread_name_prefix="offload-probe") as pool:
            return slab.nbytes / min(_sum_once(pool, parts) for _ in range(3))
    finally:
        slab.close()


def _drive(reader: NvmeReader, path: Path, seconds: float, read_bytes: int, depth: int) -> float:
    extents = _extents(path, read_bytes)
    slab = Slab(depth * read_bytes)
    flying: deque[tuple[int, TransferHandle]] = deque()
    done = 0
    start_s = time.perf_counter()
    try:
        for slot in range(depth):
            flying.append((slot, reader.read_extent(next(extents), slab.view(slot * read_bytes, read_bytes))))
        while (elapsed_s := time.perf_counter() - start_s) < seconds or done == 0:
            slot, handle = flying.popleft()
            handle.wait()
            done += handle.nbytes
            flying.append((slot, reader.read_extent(next(extents), slab.view(slot * read_bytes, read_bytes))))
        return done / elapsed_s
    finally:
        reader.cancel_pending()
        reader.drain()
        slab.close()


def _extents(path: Path, read_bytes: int) -> Iterator[Extent]:
    """Extents of the file in random order, again and again. A small file is one extent."""
    nbytes = path.stat().st_size
    if nbytes == 0:
        raise StorageError(f"{path}: an empty file cannot be measured; name a model file or a folder", path=str(path))
    generator = random.Random(0)
    places = range(0, max(align_down(nbytes, read_bytes), 1), read_bytes)
    while True:
        for offset in generator.sample(places, len(places)):
            yield Extent(path=path, offset=offset, nbytes=min(read_bytes, nbytes - offset))


@contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    """A file of random bytes on the disk, removed afterwards: some drives and file systems make zeros look fast."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".offload-probe-", dir=folder))
            for _ in range(FILE_BYTES // (8 * MIB)):
                file.write(os.urandom(8 * MIB))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"{folder}: writing a probe file of {FILE_BYTES // MIB} MiB failed: {error.strerror}; "
                "free some space, or name an existing model file or another folder",
                path=str(folder),
                errno=error.errno,
            ) from error
        yield Path(file.name)


def _sum_once(pool: ThreadPoolExecutor, parts: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]) -> float:
    start_s = time.perf_counter()
    for total in pool.map(np.sum, parts):
        assert total == 0
    return time.perf_counter() - start_s


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
