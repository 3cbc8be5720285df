"""Sessions by name: saved, listed, forked, renamed, deleted; never lost to another process, nor to a name."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from support.computed import GEOMETRY, Computed, files

from offload.errors import ClosedError, StorageError, UsageError
from offload.sessions import saved
from offload.sessions.chain import Chain, Reference
from offload.sessions.geometry import token_ids
from offload.sessions.locking import holding
from offload.sessions.manifest import Session
from offload.sessions.saved import Sessions
from offload.sessions.store import KVStore
from offload.units import MIB

CHAT = Session(
    name="chat", model="some model", fingerprint="0123456789abcdef", tokens=token_ids([5, 0, (1 << 31) - 1]),
    messages=({"role": "user", "content": "héllo\n\x00 \ud800 {}"}, {"role": "assistant", "content": ""}),
    references=(Reference("0123456789abcdef", 3),),
)  # fmt: skip


def facts(session: Session) -> dict[str, object]:
    names = ("name", "model", "fingerprint", "messages", "references", "created", "updated", "revision")
    return {**{name: getattr(session, name) for name in names}, "tokens": list(session.tokens)}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    first = sessions.save(CHAT)
    assert facts(sessions.load("chat")) == facts(first)
    assert facts(first) == {
        **facts(CHAT),
        **{name: getattr(first, name) for name in ("created", "updated", "revision")},
    }
    second = sessions.save(replace(first, tokens=token_ids([1])))
    assert list(Sessions(tmp_path).load("chat").tokens) == [1]
    assert second.created == first.created
    fork = sessions.fork("chat", "Another.one-2")
    assert list(fork.tokens) == [1] and fork.references == CHAT.references
    sessions.rename("chat", "CHAT")
    sessions.save(replace(second, name="CHAT", tokens=token_ids([2])))
    assert sessions.names() == ["Another.one-2", "CHAT"]
    assert {line.name: (line.num_tokens, line.num_messages, line.problem) for line in sessions.list()} == {
        "CHAT": (1, 2, ""), "Another.one-2": (1, 2, "")}  # fmt: skip
    assert sessions.segments() == {"0123456789abcdef"}
    sessions.delete("chat")
    sessions.delete("another.one-2")
    assert sessions.names() == [] and sessions.segments() == frozenset()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", ".hidden", "a.", "a\0", "a\n", "ä", "a b", "x" * 65, "-a"]
)
def test_what_cannot_be_a_name(tmp_path: Path, name: str) -> None:
    sessions = Sessions(tmp_path / "sessions")
    sessions.save(CHAT)
    for refused in (
        lambda: sessions.save(replace(CHAT, name=name)), lambda: sessions.load(name), lambda: sessions.delete(name),
        lambda: sessions.fork("chat", name), lambda: sessions.rename("chat", name), lambda: sessions.rename(name, "b"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as error:
            refused()
        assert "\n" not in str(error.value)
    assert {path.name for path in files(tmp_path)} == {"chat.session", ".lock"}


def test_the_nearest_name_is_offered_and_a_taken_one_refused(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    sessions.save(CHAT)
    for missing in (
        sessions.load,
        sessions.delete,
        lambda name: sessions.fork(name, "b"),
        lambda name: sessions.rename(name, "b"),
    ):
        with pytest.raises(UsageError, match="did you mean 'chat'"):
            missing("chta")
    sessions.fork("chat", "other")
    for taken in (
        lambda: sessions.save(CHAT), lambda: sessions.fork("other", "Chat"), lambda: sessions.rename("other", "CHAT"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="'chat' exists"):
            taken()


def test_a_turn_of_another_process_is_not_written_over(tmp_path: Path) -> None:
    ours, theirs = Sessions(tmp_path), Sessions(tmp_path)
    before = ours.save(CHAT)
    theirs.save(replace(theirs.load("chat"), tokens=token_ids([1])))
    with pytest.raises(UsageError, match="another process"):
        ours.save(replace(before, tokens=token_ids([2])))
    assert list(ours.load("chat").tokens) == [1]


def test_a_save_that_failed_at_its_end_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is in its place already when its folder cannot be synced."""
    sessions = Sessions(tmp_path)
    before = sessions.save(CHAT)
    after = replace(before, tokens=token_ids([1]))
    with monkeypatch.context() as patched:
        synced: list[int] = []

        def sync(descriptor: int) -> None:
            synced.append(descriptor)
            if len(synced) == 2:
                raise OSError(5, "Input/output error")

        patched.setattr(os, "fsync", sync)
        with pytest.raises(StorageError, match="Input/output error"):
            sessions.save(after)
    assert list(sessions.load("chat").tokens) == [1]
    assert list(sessions.save(after).tokens) == [1]


def test_a_process_that_hangs_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(tmp_path)
    monkeypatch.setattr(saved, "_LOCK_TIMEOUT_S", 0.05)
    with holding(tmp_path / ".lock"), pytest.raises(StorageError, match="held this lock"):
        sessions.save(CHAT)


def test_a_session_that_is_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "MAX_NBYTES", 100)
    with pytest.raises(UsageError, match="at most 100 B"):
        Sessions(tmp_path).save(CHAT)
    assert Sessions(tmp_path).names() == []


def test_all_is_for_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Sessions(tmp_path / "data" / "sessions").save(CHAT)
        store = KVStore(tmp_path / "data" / "kv", GEOMETRY, 64 * MIB)
        store.extend(Chain(), range(300), Computed(range(300)).rows)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path)}
    assert modes == {0o600}
    folders = [tmp_path / "data" / "sessions", tmp_path / "data" / "kv", store._folder]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = KVStore(tmp_path, GEOMETRY, 64 * MIB)
    chain = store.extend(Chain(), range(300), Computed(range(300)).rows)
    store.close()
    store.close()
    for call in (
        lambda: store.find([1]),
        lambda: store.extend(chain, range(400), Computed(range(400)).rows),
        store.statistics,
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()
