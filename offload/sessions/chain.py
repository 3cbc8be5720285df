"""Segments one behind the other, which hold the rows of a sequence of tokens for as long as the chain exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from offload.sessions.geometry import Ids
from offload.sessions.record import Record
from offload.sessions.rows_file import RowsFile


class Reference(NamedTuple):
    """What a session keeps of a chain's part: which segment, and how many of its leading rows."""

    segment: str
    num_rows: int


class Link(NamedTuple):
    """Leading rows of a segment that is held open. `record` counts at least those."""

    file: RowsFile
    record: Record
    num_rows: int

    @property
    def stop(self) -> int:
        return self.record.start + self.num_rows


class Chain:
    """Rows for the first `length` tokens of a sequence. Immutable; lets go of the segments when nobody refers to it."""

    __slots__ = ("links",)

    def __init__(self, links: Sequence[Link] = ()) -> None:
        stop = 0
        for link in links:
            assert link.record.start == stop and 0 < link.num_rows <= link.record.num_rows, (link, stop)
            stop = link.stop
        self.links = tuple(links)

    @property
    def length(self) -> int:
        """Positions that are covered."""
        return self.links[-1].stop if self.links else 0

    @property
    def tokens(self) -> Ids:
        """The tokens of these positions."""
        parts = [link.record.tokens[: link.num_rows] for link in self.links]
        return np.concatenate(parts) if parts else np.empty(0, "<i4")

    @property
    def references(self) -> tuple[Reference, ...]:
        """What a session keeps of it."""
        return tuple(Reference(link.record.id, link.num_rows) for link in self.links)

    def upto(self, length: int) -> Chain:
        """Without what lies behind the first `length` positions."""
        kept = [link for link in self.links if link.record.start < length]
        if kept and kept[-1].stop > length:
            kept[-1] = kept[-1]._replace(num_rows=length - kept[-1].record.start)
        return Chain(kept)
