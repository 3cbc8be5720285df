"""Reads the head of a model file, never more than the file has and never more than a fixed limit.

The bytes are kept in one growing buffer, so that a vocabulary of strings can stay where it was read. This module knows
files, sizes and error messages; it does not know what the bytes mean.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from reprlib import Repr
from struct import Struct
from types import TracebackType
from typing import Any, Final

from offload.errors import CheckpointError, StorageError
from offload.units import MIB

PIECE_BYTES: Final = MIB
DAMAGED: Final = "the file is truncated or damaged, fetch it again"
_MAX_SHOWN: Final = 96
_MAX_WORDS: Final = 300
_SHORT: Final = Repr()
_SHORT.maxstring = _SHORT.maxother = _MAX_SHOWN


def quote(value: object) -> str:
    """A name or a value out of an untrusted file, safe to print: ASCII, escaped, shortened."""
    if isinstance(value, bytes):
        value = value[:_MAX_SHOWN]
    shown = _SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= _MAX_WORDS else f"{shown[: _MAX_WORDS - 3]}..."


def one_line(words: str) -> str:
    """A message that an untrusted file has a say in, safe to print: on one line, escaped where needed, shortened."""
    line = " ".join(words[: 4 * _MAX_WORDS].split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return shown if len(shown) <= _MAX_WORDS else f"{shown[: _MAX_WORDS - 3]}..."


def is_name(value: object) -> bool:
    """Whether a value out of an untrusted file can be the name of an architecture: short, and safe to print."""
    return isinstance(value, str) and 0 < len(value) <= _MAX_SHOWN and value.isascii() and value.isprintable()


def file_mode(path: Path) -> int:
    """`st_mode` of what `path` leads to; 0 for what does not exist or cannot have that name."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def is_regular_file(path: Path) -> bool:
    """Whether `path` leads to a regular file."""
    return stat.S_ISREG(file_mode(path))


def fingerprint(digests: Iterable[bytes]) -> str:
    """One hex digest of several files' digests, in order."""
    return sha256(b"".join(digests)).hexdigest()


class HeaderReader:
    """Sequential reader of a file's first bytes. Use as a context manager.

    Attributes:
        path: the file. size: its length in bytes when it was opened. position: offset of the next byte to take.
        buffer: the bytes read so far, from offset 0; it grows in place and may reach past `position`.

    Raises:
        CheckpointError: missing, not a regular file, not readable, ends too early, or the header exceeds the limit.
        StorageError: a read failed, or the file shrank while it was being read.
    """

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        if not is_regular_file(path):  # before open(): a named pipe would block it
            state = "is not a regular file" if file_mode(path) else "does not exist"
            raise CheckpointError(f"{path}: {state}; name a .gguf file or a Hugging Face folder", path=str(path))
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}", path=str(path)) from error
        self.path = path
        self.size = os.fstat(self._file.fileno()).st_size
        self.position = 0
        self.buffer = bytearray()
        self._limit_bytes = limit_bytes
        self._num_read = 0

    def __enter__(self) -> HeaderReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hasattr(os, "posix_fadvise"):  # the page cache of a header counts against the caller's memory limit
            os.posix_fadvise(self._file.fileno(), 0, self._num_read, os.POSIX_FADV_DONTNEED)
        self._file.close()

    @property
    def remaining(self) -> int:
        """Bytes of the file after `position`."""
        return self.size - self.position

    def error(self, message: str, *, tensor: str = "") -> CheckpointError:
        """An error that names this file, to be raised by the caller."""
        return CheckpointError(f"{self.path}: {message}", path=str(self.path), tensor=tensor)

    def require(self, nbytes: int, what: str) -> None:
        """Make `nbytes` bytes from `position` on available in `buffer`; `what` names them in an error."""
        if nbytes > self.remaining:
            raise self.error(
                f"{what}: needs {nbytes} bytes at offset {self.position}, the file has {self.remaining} left of "
                f"{self.size}; {DAMAGED}"
            )
        end = self.position + nbytes
        if end > self._limit_bytes:
            raise self.error(
                f"{what}: the header reaches to byte {end} and at most {self._limit_bytes} are read; {DAMAGED}"
            )
        while len(self.buffer) < end:
            self._read_piece()

    def _read_piece(self) -> None:
        offset = len(self.buffer)
        try:
            piece = self._file.read(min(PIECE_BYTES, self.size - offset))
        except OSError as error:
            message = f"{self.path}: reading the header failed at offset {offset}: {error.strerror}"
            raise StorageError(message, path=str(self.path), offset=offset, errno=error.errno) from error
        if not piece:
            message = (
                f"{self.path}: ends at byte {offset}, had {self.size} when opened; something else is writing to it"
            )
            raise StorageError(message, path=str(self.path), offset=offset)
        self.buffer += piece
        self._num_read += len(piece)

    def skip(self, nbytes: int, what: str) -> None:
        """Move past the next `nbytes` bytes; they stay in `buffer`."""
        self.require(nbytes, what)
        self.position += nbytes

    def take(self, nbytes: int, what: str) -> bytes:
        """The next `nbytes` bytes."""
        start = self.position
        self.skip(nbytes, what)
        with memoryview(self.buffer) as view:  # slicing the buffer itself would copy twice
            return bytes(view[start : self.position])

    def unpack(self, layout: Struct, what: str) -> tuple[Any, ...]:
        """The next `layout.size` bytes as the values of `layout`."""
        start = self.position
        self.skip(layout.size, what)
        return layout.unpack_from(self.buffer, start)

    def finish(self, *, keep: int) -> bytes:
        """Drop all but the first `keep` bytes of the buffer. Returns the digest of the header and the file's size."""
        del self.buffer[self.position :]
        digest = sha256(self.buffer)
        digest.update(self.size.to_bytes(8, "little"))
        del self.buffer[keep:]
        return digest.digest()
