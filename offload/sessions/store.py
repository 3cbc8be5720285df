"""The store of KV rows: found by the tokens that they were computed from, extended turn by turn, read back, evicted.

    <folder>/<fingerprint>-<kv type>/<segment>.rows   rows, see `geometry`
                                     <segment>.json   what is known of them; with it, they exist
                                     <segment>.lock   held by whoever appends

A commit is: rows written, made durable, then the record replaced. Killed in between, a store is as it was before. Whoever
continues a conversation appends to its last segment when that ends where the conversation does and nobody else appends;
else it begins a segment of its own behind the common rows. So an edited turn, another conversation with the same beginning
and a second process are one case, and none of them writes over what a record counts.

Threads: any, one after the other; `read` runs beside the others. Processes: any number on one folder; nobody waits.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

from offload.config import KV_BUCKET
from offload.errors import ClosedError, StorageError, UsageError
from offload.sessions.catalog import LOCK, RECORD, ROWS, Catalog, cover
from offload.sessions.chain import Chain, Link
from offload.sessions.geometry import (
    FOLDER,
    MAX_CAPACITY,
    SEGMENT_ROWS,
    Geometry,
    Ids,
    Put,
    Rows,
    num_common,
    token_ids,
)
from offload.sessions.locking import holding
from offload.sessions.reading import Sound, read_link, reason
from offload.sessions.record import Record, digest, read_record, write_record
from offload.sessions.removal import sweep
from offload.sessions.room import make_room
from offload.sessions.rows_file import RowsFile
from offload.sessions.sealed import BrokenFile
from offload.tiers.files import LocalStorage, Storage


class Restored(NamedTuple):
    """How many leading positions were put back as they were stored; and, where that is not all, one line that says why."""

    positions: int
    damage: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatistics:
    """What a store holds, and what this process has done to the disk.

    Attributes:
        nbytes: on disk, of all models. num_segments, num_broken: of this geometry that can and cannot be used.
        read_bytes, written_bytes: rows, since the store was opened.
    """

    nbytes: int
    limit_bytes: int
    num_segments: int
    num_broken: int
    read_bytes: int
    written_bytes: int


class KVStore:
    """See the module.

    Args:
        folder: of the stores of all models, which share the limit.
        limit_bytes: that rows may take on disk.
        referred: ids of the segments that saved sessions refer to, see `Sessions.segments`.
        segment_rows: capacity of new segments, a multiple of 256.
        storage: what rows are read through.

    Raises:
        StorageError: the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: Path,
        geometry: Geometry,
        limit_bytes: int,
        *,
        referred: Callable[[], AbstractSet[str]] = frozenset,
        segment_rows: int = SEGMENT_ROWS,
        storage: Storage | None = None,
    ) -> None:
        if not KV_BUCKET <= segment_rows <= MAX_CAPACITY or segment_rows % KV_BUCKET:
            raise UsageError(f"segment_rows={segment_rows}: must be a multiple of {KV_BUCKET} up to {MAX_CAPACITY}")
        self.geometry = geometry
        self.limit_bytes = limit_bytes
        self._root, self._folder = folder, folder / geometry.name
        self._referred = referred
        self._segment_rows = segment_rows
        self._storage = storage or LocalStorage()
        self._lock = threading.Lock()
        self._open: WeakValueDictionary[str, RowsFile] = WeakValueDictionary()
        self._unusable: dict[str, str] = {}
        self._read_bytes = self._written_bytes = 0
        self._closed = False
        with self._reported("be opened"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._catalog = Catalog(self._folder, geometry)
            self._all = {geometry.name: self._catalog}
            sweep(self._catalog)

    def find(self, tokens: Sequence[int] | Ids) -> Chain:
        """The longest chain of stored rows for a prefix of the tokens, whoever stored them. Reads no rows.

        Raises:
            StorageError: the folder cannot be read.
        """
        ids = token_ids(tokens)
        with self._lock, self._reported("be read"):
            self._unusable.clear()
            while True:
                self._catalog.look()
                usable = (record for record in self._catalog.records.values() if record.id not in self._unusable)
                found = [(self._file(record), record, num_rows) for record, num_rows in cover(usable, ids)]
                links = [Link(file, record, num_rows) for file, record, num_rows in found if file is not None]
                if len(links) == len(found):
                    return Chain(links)

    def extend(self, chain: Chain, tokens: Sequence[int] | Ids, rows: Rows) -> Chain:
        """A chain for all of the tokens, durable on return. What it shares with `chain` is not written again.

        Args:
            chain: for a beginning of the tokens, or of others: it counts as far as they agree, and as far as it still is
                on disk.
            rows: asked for positions that are not stored, in order within each layer; possibly from 0 on.

        Raises:
            StorageError: no space, no room below the limit, an I/O error. What was stored before is sound, and `find`
                tells how far that goes.
        """
        ids = token_ids(tokens)
        with self._lock, self._reported("be written"):
            self._catalog.look()
            chain = self._still_there(chain, ids)
            self._make_room(len(ids) - chain.length)
            while chain.length < len(ids):
                chain = self._appended(chain, ids, rows) or self._begun(chain, ids, rows)
            return chain

    def read(self, chain: Chain, put: Put) -> Restored:
        """Puts back the rows of a chain. What was put beyond the positions that are told is damaged, to be computed again.

        Args:
            put: gets views that last until it returns.

        Raises:
            AllocationError: no memory for buffers.
        """
        positions = 0
        for link in chain.links:
            try:
                sound = read_link(self._storage, link, put)
            except StorageError as error:
                sound = Sound(0, reason(error))
            positions += sound.num_rows
            self._read_bytes += sound.num_rows * self.geometry.num_tables * self.geometry.row_nbytes
            with suppress(OSError):
                os.utime(link.file.path)  # last used
            if sound.num_rows < link.num_rows:
                self._cut(link, sound.num_rows)
                lost = chain.length - positions
                return Restored(positions, f"{sound.damage}; {lost} tokens have to be computed again")
        return Restored(positions)

    def statistics(self) -> StoreStatistics:
        """
        Raises:
            StorageError: the folder cannot be read.
        """
        with self._lock, self._reported("be read"):
            self._catalog.look()
            return StoreStatistics(
                nbytes=sum(catalog.nbytes(segment) for catalog in self._catalogs() for segment in catalog.segments()),
                limit_bytes=self.limit_bytes,
                num_segments=len(self._catalog.records.keys() - self._unusable.keys()),
                num_broken=len(self._catalog.broken | self._unusable),
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
            )

    def close(self) -> None:
        """Lets go of all chains' segments, which may then be evicted by others. Idempotent."""
        with self._lock:
            self._closed = True
            for file in list(self._open.values()):
                file.close()

    def _file(self, record: Record) -> RowsFile | None:
        file = self._open.get(record.id)
        if file is None:
            try:
                file = RowsFile.open(self._catalog.path(record.id, ROWS), record)
            except BrokenFile as error:
                self._unusable[record.id] = str(error)
            except OSError as error:
                self._unusable[record.id] = error.strerror or str(error)
            else:
                if file is None:
                    self._unusable[record.id] = "its rows are gone, or about to be"
                else:
                    self._open[record.id] = file
        return file

    def _still_there(self, chain: Chain, ids: Ids) -> Chain:
        length = num_common(chain.tokens, ids)
        for link in chain.links:
            now = self._catalog.records.get(link.record.id)
            stored = num_common(now.tokens, link.record.tokens) if now and now.before == link.record.before else 0
            if stored < link.num_rows:
                return chain.upto(min(length, link.record.start + stored))
        return chain.upto(length)

    def _appended(self, chain: Chain, ids: Ids, rows: Rows) -> Chain | None:
        """With rows in the room that is left in the last segment; None where that is not ours to write."""
        if not chain.links or chain.links[-1].num_rows < chain.links[-1].record.num_rows:
            return None
        last = chain.links[-1]
        with holding(self._catalog.path(last.record.id, LOCK)) as held:
            if not held:
                return None
            try:
                record = read_record(self._catalog.path(last.record.id, RECORD))
            except (BrokenFile, FileNotFoundError):
                return None
            if record.num_rows != last.num_rows or not record.has_room or record.geometry != self.geometry:
                return None
            return self._write(chain.upto(record.start), last.file, record, ids, rows)

    def _begun(self, chain: Chain, ids: Ids, rows: Rows) -> Chain:
        """With rows in a segment of its own."""
        record = Record(
            id=secrets.token_hex(8),
            geometry=self.geometry,
            capacity=self._segment_rows,
            start=chain.length,
            before=digest(ids[: chain.length]),
            parent=chain.links[-1].record.id if chain.links else "",
        )
        paths = [self._catalog.path(record.id, kind) for kind in (RECORD, ROWS, LOCK)]
        try:
            with holding(paths[2]) as held:
                if not held:  # swept between being made and being locked
                    return chain
                file = RowsFile.create(paths[1], record)
                self._open[record.id] = file
                return self._write(chain, file, record, ids, rows)
        except BaseException:
            for path in paths:
                with suppress(OSError):
                    path.unlink()
            raise

    def _write(self, chain: Chain, file: RowsFile, record: Record, ids: Ids, rows: Rows) -> Chain:
        stop = min(len(ids), record.start + record.capacity)
        before = file.written_bytes
        try:
            pieces = file.append(record, stop, rows)
        finally:
            self._written_bytes += file.written_bytes - before
        record = record.appended(ids[record.stop : stop], pieces)
        write_record(self._catalog.path(record.id, RECORD), record)
        self._catalog.records[record.id] = record
        return Chain([*chain.links, Link(file, record, record.num_rows)])

    def _cut(self, link: Link, num_rows: int) -> None:
        """What is damaged is not found again. Where that cannot be written down, the next reader finds out."""
        path = self._catalog.path(link.record.id, RECORD)
        with suppress(OSError, BrokenFile), holding(self._catalog.path(link.record.id, LOCK)) as held:
            if held and (record := read_record(path)).before == link.record.before:
                write_record(path, record.cut(num_rows))

    def _make_room(self, num_rows: int) -> None:
        """
        Raises:
            StorageError: what is open leaves no room for so many rows.
        """
        if num_rows:
            num_segments = num_rows // self._segment_rows + 2
            needed = self.geometry.disk_nbytes(num_rows, num_segments)
            make_room(self._catalogs(), needed, self.limit_bytes, list(self._open), self._referred)

    def _catalogs(self) -> list[Catalog]:
        """Of all models, this one's first."""
        for folder in self._root.iterdir():
            if folder.name not in self._all and FOLDER.fullmatch(folder.name) and folder.is_dir():
                self._all[folder.name] = Catalog(folder)
        for name in [name for name, catalog in self._all.items() if not catalog.folder.is_dir()]:
            del self._all[name]
        for catalog in self._all.values():
            catalog.look()
        return list(self._all.values())

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """
        Raises:
            StorageError: instead of OSError. ClosedError: the store was closed.
        """
        if self._closed:
            raise ClosedError(f"{self._folder}: the store was closed; open it again")
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"stored conversations in {self._folder} cannot {what}: {error.strerror or error}; "
                "check the disk's space and permissions",
                path=str(self._folder),
                errno=error.errno,
            ) from error
