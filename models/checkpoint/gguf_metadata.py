"""Key-values of a GGUF header (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Values become bool, int, float, str or a sequence of those. Arrays of up to 1024 elements are tuples; longer ones stay
packed, as `PackedStrings` or `array.array`. What a key means is not known here.
"""

from __future__ import annotations

import sys
from array import array
from struct import Struct
from typing import Any, Final

from offload.models.checkpoint.packed import PREFIX_BYTES, PackedStrings, decode
from offload.models.checkpoint.reader import DAMAGED, HeaderReader, quote
from offload.units import MIB

U32: Final = Struct("<I")
U64: Final = Struct("<Q")
KEY_AND_TYPE_BYTES: Final = 8 + 1 + 4 + 1  # the shortest key-value that can be: one-letter key, one-byte value

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: Final = {
    code: Struct(f"<{letter}")
    for code, letter in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}.items()
}
_MAX_TUPLE: Final = 1024
_MAX_DEPTH: Final = 4
_MAX_NAME_BYTES: Final = 65535

_MEMORY_BYTES: Final = 24 * MIB
_KEY_COST, _STRING_COST, _NUMBER_COST, _OFFSET_COST = 256, 84, 40, 9  # CPython bytes per object, rounded up


class Purse:
    """Memory that a header may still take up once it is parsed; spending more than there is raises."""

    def __init__(self, reader: HeaderReader) -> None:
        self._reader = reader
        self._left_bytes = _MEMORY_BYTES

    def spend(self, nbytes: int, what: str) -> None:
        """Account for `nbytes` about to be allocated for `what`."""
        self._left_bytes -= nbytes
        if self._left_bytes < 0:
            limit = _MEMORY_BYTES // MIB
            raise self._reader.error(f"{what}: the header would take more than {limit} MiB of memory; {DAMAGED}")


def read_name(reader: HeaderReader, what: str) -> str:
    """A key or a tensor name: 1 to 65535 bytes of valid UTF-8."""
    (length,) = reader.unpack(U64, f"length of {what}")
    if not 1 <= length <= _MAX_NAME_BYTES:
        raise reader.error(f"{what}: name of {length} bytes, expected 1 to {_MAX_NAME_BYTES}; {DAMAGED}")
    try:
        return reader.take(length, what).decode("utf-8")
    except UnicodeDecodeError:
        raise reader.error(f"{what}: the name is not UTF-8; {DAMAGED}") from None


def read_metadata(reader: HeaderReader, count: int, purse: Purse) -> dict[str, object]:
    """The next `count` key-values.

    Raises:
        CheckpointError: lengths or counts exceed the file, unknown type, duplicate key, too deep, too large.
    """
    if count * KEY_AND_TYPE_BYTES > reader.remaining:
        raise reader.error(f"{count} key-values cannot fit in the {reader.remaining} bytes that follow; {DAMAGED}")
    metadata: dict[str, object] = {}
    for index in range(count):
        key = read_name(reader, f"key {index}")
        if key in metadata:
            raise reader.error(f"key {quote(key)} appears twice; {DAMAGED}")
        purse.spend(_KEY_COST + 4 * len(key), f"key {index}")
        (code,) = reader.unpack(U32, f"type of {quote(key)}")
        metadata[key] = _Value(reader, purse, quote(key)).read(code)
    return metadata


class _Value:
    """Reads the value of one key; `what` names it in errors."""

    def __init__(self, reader: HeaderReader, purse: Purse, what: str) -> None:
        self._reader = reader
        self._purse = purse
        self._what = what

    def read(self, code: int, depth: int = 0) -> object:
        """A value of the type `code`."""
        if code == _STRING:
            return self._string()
        if code == _BOOL:
            return self._bools(1)[0]
        if code == _ARRAY:
            return self._array(depth + 1)
        return self._reader.unpack(self._number(code), self._what)[0]

    def _number(self, code: int) -> Struct:
        if code not in _NUMBERS:
            raise self._reader.error(f"{self._what}: value type {code} is none of 0 to 12; {DAMAGED}")
        return _NUMBERS[code]

    def _string(self) -> str:
        (length,) = self._reader.unpack(U64, f"length of {self._what}")
        if length > self._reader.remaining:
            remaining = self._reader.remaining
            raise self._reader.error(f"{self._what}: string of {length} bytes, {remaining} left in the file; {DAMAGED}")
        self._purse.spend(_STRING_COST + 4 * length, self._what)  # one rare character makes all of them 4 bytes wide
        return decode(self._reader.take(length, self._what))

    def _bools(self, count: int) -> tuple[bool, ...]:
        self._purse.spend(8 * count, self._what)
        data = self._reader.take(count, self._what)
        if data and max(data) > 1:
            raise self._reader.error(f"{self._what}: truth value {max(data)}, expected 0 or 1; {DAMAGED}")
        return tuple(map(bool, data))

    def _array(self, depth: int) -> object:
        if depth > _MAX_DEPTH:
            raise self._reader.error(f"{self._what}: arrays nested deeper than {_MAX_DEPTH}; {DAMAGED}")
        (code,) = self._reader.unpack(U32, f"element type of {self._what}")
        (count,) = self._reader.unpack(U64, f"element count of {self._what}")
        least = {_STRING: 8, _BOOL: 1, _ARRAY: 12}.get(code) or self._number(code).size
        self._reader.require(count * least, f"{self._what}: {count} elements of at least {least} bytes")
        if code == _STRING:
            return self._strings(count)
        if code == _BOOL:
            return self._bools(count)
        if code == _ARRAY:
            self._purse.spend((_STRING_COST + 8) * count, self._what)
            return tuple(self._array(depth + 1) for _ in range(count))
        return self._numbers(self._number(code), count)

    def _numbers(self, layout: Struct, count: int) -> tuple[Any, ...] | array[Any]:
        short = count <= _MAX_TUPLE
        self._purse.spend(count * (_NUMBER_COST if short else layout.size), self._what)
        values: array[Any] = array(layout.format[-1])
        assert values.itemsize == layout.size
        start = self._reader.position
        self._reader.skip(count * layout.size, self._what)
        with memoryview(self._reader.buffer) as view:
            values.frombytes(view[start : self._reader.position])
        if sys.byteorder == "big":
            values.byteswap()
        return tuple(values) if short else values

    def _strings(self, count: int) -> tuple[str, ...] | PackedStrings:
        if count <= _MAX_TUPLE:
            return tuple(self._string() for _ in range(count))
        self._purse.spend(_OFFSET_COST * count, self._what)
        reader, buffer, size, read_length = self._reader, self._reader.buffer, self._reader.size, U64.unpack_from
        starts = array("Q")
        position = reader.position
        for index in range(count):
            start = position + PREFIX_BYTES
            if start > len(buffer):
                reader.position = position
                reader.require(PREFIX_BYTES, f"{self._what}[{index}]")
            (length,) = read_length(buffer, position)
            position = start + length
            if position > size:
                raise reader.error(f"{self._what}[{index}]: string of {length} bytes, {size - start} left; {DAMAGED}")
            starts.append(start)
        starts.append(position + PREFIX_BYTES)
        reader.skip(position - reader.position, self._what)
        return PackedStrings(buffer, starts)
