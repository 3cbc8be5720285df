"""A vocabulary's strings, left as the bytes that they are in the file.

Half a million `str` objects take 40 MB; packed, they take what the file takes and eight bytes each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

PREFIX_BYTES = 8  # little-endian length in front of each string


def decode(data: bytes | bytearray) -> str:
    """UTF-8 text; bytes that are none survive as lone surrogates (`text.encode("utf-8", "surrogateescape")`)."""
    return data.decode("utf-8", "surrogateescape")


class PackedStrings(Sequence[str]):
    """Immutable sequence of strings over a header's buffer. Each access decodes anew.

    Args:
        buffer: bytes in which every string is preceded by its length; must not change afterwards.
        starts: offset of each string's first byte, then one more as if a string followed.
    """

    __slots__ = ("_buffer", "_starts")

    def __init__(self, buffer: bytearray, starts: array[int]) -> None:
        self._buffer = buffer
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self._at(i) for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        return self._at(index % len(self))

    def _at(self, index: int) -> str:
        return decode(self._buffer[self._starts[index] : self._starts[index + 1] - PREFIX_BYTES])

    def __iter__(self) -> Iterator[str]:
        return map(self._at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (PackedStrings, tuple, list)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"
