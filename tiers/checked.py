"""Reads of files that must not change: opening several at once, bounds, and the check that belongs to every read.

Knows nothing of threads; every function may run on any.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from offload.blocks import Extent
from offload.errors import StorageError
from offload.tiers.files import File, Storage, read_exactly


def open_all(storage: Storage, paths: Sequence[Path]) -> dict[Path, File]:
    """Opens every path, or none: a failure closes those opened before it."""
    with ExitStack() as stack:
        files: dict[Path, File] = {}
        for path in dict.fromkeys(paths):
            files[path] = storage.open(path)
            stack.callback(files[path].close)
        stack.pop_all()
        return files


def check_inside(file: File, extent: Extent) -> None:
    """
    Raises:
        StorageError: the extent passes the end of the file.
    """
    if extent.end > file.nbytes:
        raise StorageError(
            f"{file.path}: bytes {extent.offset} to {extent.end} wanted, the file has {file.nbytes}; download it again",
            path=str(file.path),
            offset=extent.offset,
        )


def check_unchanged(file: File) -> None:
    """
    Raises:
        StorageError: the file is no longer the one that was opened.
    """
    difference = file.changed()
    if difference is not None:
        raise StorageError(f"{file.path}: {difference} while it was in use; load the model again", path=str(file.path))


def read_checked(file: File, destination: memoryview, offset: int, needed: int) -> None:
    """`read_exactly` of a file that is still the one that was opened.

    Raises:
        StorageError: the read failed or the file changed. When both, the change is named: it is the cause.
    """
    try:
        read_exactly(file, destination, offset, needed)
    finally:
        check_unchanged(file)
