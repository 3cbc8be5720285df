"""A stream as a device gives it: zeros, more of them than memory should hold."""

from __future__ import annotations

import io
from typing import Any

CAP_BYTES = (
    80 * 1024**2
)  # where it ends all the same, so that a reader without a limit fails its test and not the machine


class Endless(io.RawIOBase):
    """`first`, then zeros. `given` bytes were asked for and came."""

    def __init__(self, first: bytes) -> None:
        self.first = first
        self.given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.first:
            chunk, self.first = self.first, b""
        else:
            chunk = bytes(min(len(buffer), CAP_BYTES - self.given))
        buffer[: len(chunk)] = chunk
        self.given += len(chunk)
        return len(chunk)


def endless(first: bytes = b"") -> tuple[io.BufferedReader, Endless]:
    """The stream, and what counts its bytes."""
    raw = Endless(first)
    return io.BufferedReader(raw), raw
