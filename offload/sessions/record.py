"""What is known of one segment: whose rows, of which tokens, and the checksums that verify them.

A record is replaced as a whole, and only after the rows that it counts are durable. What it counts never changes: tokens
and pieces are added at the end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from offload.config import KV_BUCKET
from offload.errors import UsageError
from offload.sessions.geometry import MAX_CAPACITY, Geometry, Ids
from offload.sessions.sealed import BrokenFile, packed, read_small, seal, text, unpacked, unseal, whole, write_sealed
from offload.units import MIB, PAGE

KIND: Final = "offload-kv-segment"
ROWS_KIND: Final = "offload-kv-rows"
VERSION: Final = 1
SEGMENT_ID: Final = re.compile(r"[0-9a-f]{16}")
MAX_NBYTES: Final = 8 * MIB
_CHECKSUM: Final = re.compile(r"[0-9a-f]{16}")
_DIGEST: Final = re.compile(r"[0-9a-f]{32}")


class Piece(NamedTuple):
    """Rows that were written at once, and lie in one bucket of the segment: what a checksum covers, over all tables."""

    num_rows: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """Rows for positions `[start, stop)` of one sequence of tokens.

    Attributes:
        capacity: rows that the file has room for.
        before: digest of the tokens before `start`, without which these rows mean nothing.
        parent: the segment that it was built on, or nothing. It goes later than this one; what the rows mean never
            depends on it.
        is_sealed: nothing is appended any more, since rows behind the last have been damaged.
    """

    id: str
    geometry: Geometry
    capacity: int
    start: int
    before: str
    parent: str = ""
    tokens: Ids = field(default_factory=lambda: np.empty(0, "<i4"))
    pieces: tuple[Piece, ...] = ()
    is_sealed: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def stop(self) -> int:
        return self.start + self.num_rows

    @property
    def has_room(self) -> bool:
        return not self.is_sealed and self.num_rows < self.capacity

    def appended(self, tokens: Ids, pieces: Sequence[Piece]) -> Record:
        """With more rows."""
        return replace(self, tokens=np.concatenate([self.tokens, tokens]), pieces=(*self.pieces, *pieces))

    def cut(self, num_rows: int) -> Record:
        """With the leading rows only, which end with a piece; sealed."""
        kept, rows = [], 0
        for piece in self.pieces:
            if rows + piece.num_rows > num_rows:
                break
            kept.append(piece)
            rows += piece.num_rows
        return replace(self, tokens=self.tokens[:rows], pieces=tuple(kept), is_sealed=True)

    def header(self) -> bytes:
        """The first page of the file of rows: what must not be taken for another's."""
        facts = {"id": self.id, **asdict(self.geometry), "capacity": self.capacity, "start": self.start}
        return seal(ROWS_KIND, VERSION, facts).ljust(PAGE, b"\0")


def digest(tokens: Ids) -> str:
    """Of a sequence of tokens; nobody can make two that share one."""
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16).hexdigest()


def write_record(path: Path, record: Record) -> None:
    """Writes in one step.

    Raises:
        OSError: see `write_sealed`.
    """
    fields = {
        **asdict(record.geometry),
        **{name: getattr(record, name) for name in ("id", "capacity", "start", "before", "parent", "is_sealed")},
        "tokens": packed(record.tokens),
        "pieces": record.pieces,
    }
    write_sealed(path, seal(KIND, VERSION, fields))


def read_record(path: Path) -> Record:
    """
    Raises:
        BrokenFile: it is no record, or says what cannot be. OSError: it cannot be read.
    """
    fields = unseal(KIND, VERSION, read_small(path, MAX_NBYTES))
    try:
        geometry = Geometry(**{name: fields.get(name) for name in Geometry.__slots__})  # type: ignore[arg-type]
    except UsageError as error:
        raise BrokenFile(str(error)) from None
    capacity = whole(fields, "capacity", MAX_CAPACITY)
    tokens = unpacked(fields.get("tokens"), capacity)
    pieces = _pieces(fields.get("pieces"))
    if sum(piece.num_rows for piece in pieces) != len(tokens) or _straddle(pieces):
        raise BrokenFile(f"{len(pieces)} checksums do not fit {len(tokens)} tokens")
    record = Record(
        id=_matching(fields, "id", SEGMENT_ID),
        geometry=geometry,
        capacity=capacity,
        start=whole(fields, "start", 1 << 40),
        before=_matching(fields, "before", _DIGEST),
        parent=_matching(fields, "parent", SEGMENT_ID) if fields.get("parent") else "",
        tokens=tokens,
        pieces=pieces,
        is_sealed=fields.get("is_sealed") is not False,
    )
    if record.id != path.name.partition(".")[0]:
        raise BrokenFile(f"the record of segment {record.id}")
    return record


def _matching(fields: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = text(fields, name)
    if not pattern.fullmatch(value):
        raise BrokenFile(f"{name} must match {pattern.pattern}")
    return value


def _pieces(listed: Any) -> tuple[Piece, ...]:
    if not isinstance(listed, list) or len(listed) > MAX_CAPACITY:
        raise BrokenFile("pieces are no list")
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            raise BrokenFile("a piece is no pair")
        if whole({"rows": entry[0]}, "rows", KV_BUCKET) == 0 or not _CHECKSUM.fullmatch(entry[1]):
            raise BrokenFile("a piece without rows or checksum")
    return tuple(Piece(*entry) for entry in listed)


def _straddle(pieces: Sequence[Piece]) -> bool:
    rows = 0
    for piece in pieces:
        if rows % KV_BUCKET + piece.num_rows > KV_BUCKET:
            return True
        rows += piece.num_rows
    return False
