"""Files that appear whole or not at all: written beside their place, made durable, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

PUBLIC: Final = 0o666
"""For whoever the umask allows."""
PRIVATE: Final = 0o600


@contextmanager
def beside(path: Path, *, mode: int = PUBLIC, new: bool = False) -> Iterator[Path]:
    """A new file in the same folder, which takes the place of `path` when the block ends well, and goes when it does not.

    Two writers of one path do not meet: the last to finish stays whole.

    Args:
        new: something that is at `path` when the block has ended is not replaced.

    Raises:
        OSError: the file cannot be made, made durable or renamed; FileExistsError with `new`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        if new and path.exists():
            raise FileExistsError(17, "it is there already", str(path))
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows has no handle for a folder; its rename is durable by itself
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
