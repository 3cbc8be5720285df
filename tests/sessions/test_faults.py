"""Every call to the system fails once: a write, a sync, a rename, an open. One line, and what was committed stays sound."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.computed import GEOMETRY, Computed, files, restored

from offload.errors import StorageError
from offload.sessions import locking
from offload.sessions.catalog import RECORD, ROWS
from offload.sessions.chain import Chain
from offload.sessions.geometry import token_ids
from offload.sessions.manifest import Session
from offload.sessions.saved import SUFFIX, Sessions
from offload.sessions.store import KVStore
from offload.tiers.files import LocalFile, LocalStorage
from offload.units import MIB

FIRST = [*range(300)]
SECOND = [*FIRST, *range(50)]  # goes on in the same segment, and in a new one
EDITED = [*FIRST[:100], *range(400)]
CALLS: list[tuple[Any, str]] = [
    (os, "open"),
    (os, "write"),
    (os, "fsync"),
    (os, "ftruncate"),
    (os, "replace"),
    (Path, "write_bytes"),
    (Path, "replace"),
    (locking, "try_lock"),
]


class Faults:
    """Lets calls through until number `at`, which fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, number: int) -> None:
        self.seen, self.at, self.number = 0, at, number
        for owner, name in CALLS:
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*words: Any, **named: Any) -> Any:
            self.seen += 1
            if self.seen - 1 == self.at:
                raise OSError(self.number, os.strerror(self.number))
            return call(*words, **named)

        return counting


def opened(folder: Path) -> tuple[Sessions, KVStore]:
    return Sessions(folder / "sessions"), KVStore(folder / "kv", GEOMETRY, 64 * MIB, segment_rows=256)


def turn(sessions: Sessions, store: KVStore, tokens: list[int], text: str) -> None:
    chain = store.extend(store.find(tokens), tokens, Computed(tokens).rows)
    before = sessions.load("chat") if sessions.names() else Session(name="chat", model="m", fingerprint="f")
    messages = ({"role": "user", "content": text},)
    sessions.save(replace(before, tokens=token_ids(tokens), messages=messages, references=chain.references))


@pytest.mark.parametrize(("before", "after"), [([], FIRST), (FIRST, SECOND), (SECOND, EDITED)])
def test_a_turn_whose_every_call_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int], after: list[int]
) -> None:
    at, failed = 0, 0
    while True:
        number = (errno.ENOSPC, errno.EIO)[at % 2]
        folder = tmp_path / str(at)
        sessions, store = opened(folder)
        if before:
            turn(sessions, store, before, "before")
        with monkeypatch.context() as patched:
            faults = Faults(patched, at, number)
            try:
                turn(sessions, store, after, "after")
            except StorageError as error:
                failed += 1
                assert "\n" not in str(error) and error.errno == number
            done = faults.seen <= at
        rows = [path for path in files(folder / "kv") if path.suffix == ROWS]
        assert all(path.with_suffix(RECORD).exists() for path in rows)  # a full disk is not filled with what failed
        if done:
            break
        for again in ((sessions, store), opened(folder)):
            saved = again[0].load("chat") if again[0].names() else None
            assert (saved is None and not before) or saved is not None
            text = saved.messages[0]["content"] if saved else "before"
            assert saved is None or list(saved.tokens) == {"before": before, "after": after}[text]
            chain = again[1].find(saved.tokens if saved else [])
            assert chain.length == len(saved.tokens if saved else [])
            assert restored(again[1], chain, list(chain.tokens)).positions == chain.length
        turn(sessions, store, after, "after")  # the same objects go on
        assert list(opened(folder)[0].load("chat").tokens) == after
        del chain, again, store, sessions
        left = {path.name.partition(".")[0] for path in files(folder / "kv")}
        opened(folder)
        names = {path.name for path in files(folder / "kv") if not path.name.endswith(".lock")}
        assert names == {name + kind for name in left for kind in (RECORD, ROWS) if name + kind in names}
        assert {name for name in names if name.endswith(ROWS)} == {name[:-5] + ROWS for name in names if RECORD in name}
        at += 1
    assert failed > 10


def test_a_commit_is_rows_then_their_record_then_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill does not tell whether anything was synced: the page cache survives it."""
    sessions, store = opened(tmp_path)
    dirty: set[int] = set()
    renamed: list[str] = []
    write, sync, replace_path = os.write, os.fsync, Path.replace

    def writing(descriptor: int, data: memoryview) -> int:
        dirty.add(os.fstat(descriptor).st_ino)
        return write(descriptor, data)

    def syncing(descriptor: int) -> None:
        dirty.discard(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def replacing(path: Path, target: Path) -> Path:
        assert not dirty, (target, dirty)
        renamed.append(target.suffix)
        return replace_path(path, target)

    monkeypatch.setattr(os, "write", writing)
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    for tokens in (FIRST, SECOND, EDITED):
        turn(sessions, store, tokens, "text")
    assert renamed == [RECORD, RECORD, SUFFIX, RECORD, SUFFIX, RECORD, RECORD, SUFFIX]


class Spoiled(LocalStorage):
    """Reads at and behind an offset fail."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset

    def open(self, path: Path) -> LocalFile:
        storage = self

        class File(LocalFile):
            __slots__ = ()

            def read_into(self, destination: memoryview, offset: int) -> int:
                if offset <= storage.offset < offset + len(destination):
                    raise OSError(errno.EIO, "Input/output error")
                return super().read_into(destination, offset)

        return File(path, os.open(path, os.O_RDONLY), direct=False)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("row", [0, 255, 256, 700])
def test_a_sector_that_cannot_be_read_costs_what_lies_behind_it(tmp_path: Path, layer: int, row: int) -> None:
    """Rows of one block are read at once; those before it are put back, those behind are computed and stored again."""
    tokens = [*range(1000)]
    store = KVStore(tmp_path, GEOMETRY, 64 * MIB)
    chain = store.extend(Chain(), tokens, Computed(tokens).rows)
    whole = chain.links[0].record
    store._storage = Spoiled(GEOMETRY.offset(whole.capacity, layer, 1, row))
    result = restored(store, chain, tokens)
    assert (
        result.positions == 0 and "Input/output error; 1000 tokens have to be computed again" in result.damage
    )  # small rows are one block
    store._storage = LocalStorage()
    assert store.find(tokens).length == 0
    computed = Computed(tokens)
    again = store.extend(chain, tokens, computed.rows)
    assert computed.asked == 0 and restored(store, again, tokens).positions == len(tokens)
    assert again.links[0].record.id != whole.id  # nothing is written where the disk is bad


@pytest.mark.parametrize("row", [0, 255, 256, 511, 700, 999])
def test_a_damaged_row_ends_what_is_sound_at_its_bucket(tmp_path: Path, row: int) -> None:
    tokens = [*range(1000)]
    store = KVStore(tmp_path, GEOMETRY, 64 * MIB)
    chain = store.extend(Chain(), tokens, Computed(tokens).rows)
    record = chain.links[0].record
    with chain.links[0].file.path.open("r+b") as file:
        file.seek(GEOMETRY.offset(record.capacity, 1, 2, row) + 39)
        file.write(b"\xaa\x55"[row % 2 :][:1])
    sound = row - row % 256
    longer = [*tokens, 1]
    for cut in (chain.upto(999), chain):  # the second time it is known, and not read again
        result = restored(store, cut, tokens)
        assert result.positions == sound and "computed again" in result.damage and "\n" not in result.damage
    assert store.find(tokens).length == sound
    computed = Computed(longer)
    again = store.extend(store.find(longer), longer, computed.rows)
    assert computed.asked == sound
    assert again.links[-1].record.id != record.id  # nothing is written behind a damaged row
    assert restored(store, again, longer) == (len(longer), "")
    assert store.find(longer).length == len(longer)


def test_a_read_error_leaves_the_blocks_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.sessions.geometry.BLOCK_BYTES", 1)  # a block is a bucket
    tokens = [*range(1000)]
    store = KVStore(tmp_path, GEOMETRY, 64 * MIB)
    chain = store.extend(Chain(), tokens, Computed(tokens).rows)
    store._storage = Spoiled(GEOMETRY.offset(chain.links[0].record.capacity, 0, 0, 900))
    assert restored(store, chain, tokens).positions == 768
