"""What the rows of a KV cache look like, and where they lie in a segment's file.

    page 0             who the file belongs to
    layer 0   head 0   [ row | row | row ...   capacity rows ], padded to a page
              head 1   [ row | row | row ...                 ]
    layer 1   ...

A table of a segment is one run of the file, as it is one run of memory in the cache. What is not written takes no space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from offload.config import KV_BUCKET
from offload.errors import UsageError
from offload.units import MIB, PAGE, align_down, align_up

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int32]
Rows = Callable[[int, int, int], Bytes]
"""`rows(layer, start, stop)`: the cache's positions `[start, stop)` of a layer, [num_heads, stop - start, row_nbytes]."""
Put = Callable[[int, int, Bytes], None]
"""`put(layer, start, rows)`: puts rows of a layer back from position `start` on."""

SEGMENT_ROWS: Final = 4096
"""Of a new segment. A table of 2 MiB (128 numbers of 16 bits, twice) is long enough for the disk, and an edited answer
leaves at most so many rows behind that nobody refers to."""
MAX_CAPACITY: Final = 1 << 16
BLOCK_BYTES: Final = 4 * MIB  # of one layer, handed over at once
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{8,128}")
_KV_TYPE: Final = re.compile(r"[a-z0-9][a-z0-9_.]{0,63}")
FOLDER: Final = re.compile(f"{_FINGERPRINT.pattern}-{_KV_TYPE.pattern}")
_LIMITS: Final = (("num_layers", 1 << 16), ("num_heads", 1 << 16), ("row_nbytes", 1 << 24))


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Rows that are interchangeable: of one model, in one element type.

    Attributes:
        fingerprint: of the checkpoint. kv_type: of the cache's elements, and whatever else decides a row's bits.
        num_heads: of each layer's cache. row_nbytes: of a position of one head.
    """

    fingerprint: str
    kv_type: str
    num_layers: int
    num_heads: int
    row_nbytes: int

    def __post_init__(self) -> None:
        for name, pattern in (("fingerprint", _FINGERPRINT), ("kv_type", _KV_TYPE)):
            value = getattr(self, name)
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise UsageError(f"{name}={value!r}: must match {pattern.pattern}")
        for name, most in _LIMITS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise UsageError(f"{name}={value!r}: must be a whole number from 1 to {most}")

    @property
    def name(self) -> str:
        """Of the folder that holds such rows."""
        return f"{self.fingerprint}-{self.kv_type}"

    @property
    def num_tables(self) -> int:
        """One for each head of each layer."""
        return self.num_layers * self.num_heads

    @property
    def block_rows(self) -> int:
        """Rows of a layer that are handed over at once: whole buckets, at least one."""
        return max(KV_BUCKET, align_down(BLOCK_BYTES // (self.num_heads * self.row_nbytes), KV_BUCKET))

    def table_nbytes(self, capacity: int) -> int:
        """From one table to the next."""
        return align_up(capacity * self.row_nbytes)

    def file_nbytes(self, capacity: int) -> int:
        """Length of a segment's file, most of which may be a hole."""
        return PAGE + self.num_tables * self.table_nbytes(capacity)

    def offset(self, capacity: int, layer: int, head: int, row: int) -> int:
        """Where a row lies in the file."""
        return PAGE + (layer * self.num_heads + head) * self.table_nbytes(capacity) + row * self.row_nbytes

    def disk_nbytes(self, num_rows: int, num_segments: int) -> int:
        """The most that so many new rows take on disk in so many segments: pages at both ends, and the map of the holes."""
        pages = 2 * self.num_tables + self.num_tables // 128 + 2
        return self.num_tables * num_rows * self.row_nbytes + num_segments * pages * PAGE


def token_ids(tokens: Sequence[int] | Ids) -> Ids:
    """The tokens as numbers of 32 bits.

    Raises:
        UsageError: one of them is no token.
    """
    try:
        ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
    except (OverflowError, ValueError, TypeError) as error:
        raise UsageError(f"tokens: must be whole numbers ({error})") from None
    if ids.size and not 0 <= ids.min() <= ids.max() < 1 << 31:
        raise UsageError(f"tokens from {ids.min()} to {ids.max()}: must be from 0 to {(1 << 31) - 1}")
    return ids.astype("<i4")


def num_common(left: Ids, right: Ids) -> int:
    """Length of the common prefix."""
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if different.size else length


def ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """`[start, stop)` cut at the multiples of `step`."""
    while start < stop:
        end = min(stop, start - start % step + step)
        yield start, end
        start = end
