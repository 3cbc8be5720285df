"""The segments of one folder, and which of them cover a sequence of tokens. Reads records, never rows.

Tokens are compared as they are, and not by hashes of buckets: they are four bytes beside a hundred thousand of a row, a
prefix is found to the token, and nothing can collide. Only what lies before a segment is compared by a digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from offload.sessions.geometry import Geometry, Ids, num_common
from offload.sessions.record import SEGMENT_ID, Record, read_record
from offload.sessions.sealed import BrokenFile

RECORD, ROWS, LOCK = ".json", ".rows", ".lock"
_BLOCK: Final = 512  # of st_blocks, whatever the file system's own


class Catalog:
    """What a folder holds, as it was when it was last looked at.

    Attributes:
        records: of segments that can be used.
        broken: why others cannot, by their id.
        newer: what only a later version of this program can tell; it is left alone.
    """

    def __init__(self, folder: Path, geometry: Geometry | None = None) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {}
        self.broken: dict[str, str] = {}
        self.newer: set[str] = set()
        self._geometry = geometry
        self._seen: dict[str, tuple[int, ...]] = {}

    def path(self, segment: str, kind: str) -> Path:
        """Where a segment's file of a kind lies."""
        return self.folder / f"{segment}{kind}"

    def look(self) -> None:
        """Reads what is new or has changed, and forgets what is gone.

        Raises:
            OSError: the folder cannot be read.
        """
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(RECORD) and SEGMENT_ID.fullmatch(entry.name[: -len(RECORD)]):
                    status = entry.stat(follow_symlinks=False)
                    found[entry.name[: -len(RECORD)]] = (status.st_ino, status.st_size, status.st_mtime_ns)
        for segment in self._seen.keys() - found.keys():
            self.forget(segment)
        for segment, status_now in found.items():
            if self._seen.get(segment) != status_now and self._read(segment):
                self._seen[segment] = status_now

    def forget(self, segment: str) -> None:
        """Until it is seen again."""
        self._seen.pop(segment, None)
        self.records.pop(segment, None)
        self.broken.pop(segment, None)
        self.newer.discard(segment)

    def segments(self) -> set[str]:
        """Every id that a file is named after, with a record or without."""
        names = (path.name.partition(".")[0] for path in self.folder.iterdir())
        return {name for name in names if SEGMENT_ID.fullmatch(name)}

    def nbytes(self, segment: str) -> int:
        """What its rows take on disk; 0 when they are gone."""
        try:
            status = self.path(segment, ROWS).lstat()
        except OSError:
            return 0
        return status.st_blocks * _BLOCK if hasattr(status, "st_blocks") else status.st_size

    def used_at(self, segment: str) -> float:
        """When its rows were last read or written, in seconds since 1970."""
        try:
            return self.path(segment, ROWS).lstat().st_mtime
        except OSError:
            return 0.0

    def _read(self, segment: str) -> bool:
        """Whether what was found stays so until the file changes."""
        self.forget(segment)
        try:
            record = read_record(self.path(segment, RECORD))
            if self._geometry not in (None, record.geometry):
                raise BrokenFile("rows of another geometry")
            self.records[segment] = record
        except FileNotFoundError:
            return False  # removed since the folder was read
        except OSError as error:
            self.broken[segment] = error.strerror or str(error)
            return False
        except BrokenFile as error:
            self.broken[segment] = str(error)
            if error.newer:
                self.newer.add(segment)
        return True


def cover(records: Iterable[Record], ids: Ids) -> list[tuple[Record, int]]:
    """The segments, each with how many of its leading rows, that together cover the longest prefix of the tokens.

    Of those that begin within what is covered, the one that reaches farthest is taken, and so on: as few as can be.
    """
    hashed, start = hashlib.blake2b(digest_size=16), 0
    chosen: list[Record] = []
    covered, farthest, best = 0, 0, None
    for record in sorted(records, key=lambda record: record.start):
        if record.start > farthest:
            break
        if record.start > covered:
            assert best is not None
            chosen.append(best)
            covered = farthest
        if record.start > start:
            hashed.update(ids[start : record.start].tobytes())
            start = record.start
        if record.before == hashed.copy().hexdigest():
            reach = start + num_common(record.tokens, ids[start:])
            if reach > farthest:
                farthest, best = reach, record
    if best is None:
        return []
    if farthest > covered:
        chosen.append(best)
    stops = [*(record.start for record in chosen[1:]), farthest]
    return [(record, stop - record.start) for record, stop in zip(chosen, stops, strict=True)]
