"""Locks on files that end with their process, however it ends.

They belong to an open file and not to a process, so that two stores in one process keep out of each other's way as well.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from offload.errors import StorageError
from offload.sessions.sealed import NO_FOLLOW
from offload.writing import PRIVATE

FLAGS: Final[int] = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | NO_FOLLOW
_POLL_S: Final = 0.01

if sys.platform == "win32":
    import msvcrt

    def try_lock(descriptor: int, *, shared: bool = False) -> bool:
        """Windows refuses to remove an open file, which is all that a shared lock is there for."""
        if shared:
            return True
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def try_lock(descriptor: int, *, shared: bool = False) -> bool:
        """Locks an open file until it is closed; False where somebody else's lock is in the way."""
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        return True


@contextmanager
def excluding(path: Path) -> Iterator[bool]:
    """Keeps everyone from opening a file for use while the block runs; False where somebody has it open.

    Raises:
        OSError: it cannot be opened; FileNotFoundError when there is none.
    """
    if sys.platform == "win32":  # which looks for itself when the file is removed
        yield True
        return
    descriptor = os.open(path, FLAGS | getattr(os, "O_NONBLOCK", 0))
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Holds a lock file, made where it is missing, while the block runs; False where another has it, or removes it.

    Raises:
        OSError: it cannot be made or locked.
    """
    descriptor = os.open(path, FLAGS | os.O_CREAT, PRIVATE)
    try:
        yield try_lock(descriptor) and os.fstat(descriptor).st_nlink > 0
    finally:
        os.close(descriptor)


@contextmanager
def waiting_for(path: Path, timeout_s: float) -> Iterator[None]:
    """As `holding`, for work that takes milliseconds: waits until the lock is free.

    Raises:
        StorageError: another process has held it all the time. OSError: as `holding`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with holding(path) as held:
            if held:
                yield
                return
        if time.monotonic() > deadline:
            raise StorageError(
                f"{path}: another process has held this lock for {timeout_s:g} s; end it and try again", path=str(path)
            )
        time.sleep(_POLL_S)
