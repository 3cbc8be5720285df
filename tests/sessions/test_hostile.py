"""Files that lie, and what is no file: passed over or refused in one line, never believed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.computed import GEOMETRY, Computed, files, restored
from xxhash import xxh3_64_hexdigest

from offload.errors import CheckpointError, UsageError
from offload.sessions.catalog import RECORD, ROWS
from offload.sessions.chain import Chain
from offload.sessions.geometry import Geometry, token_ids
from offload.sessions.manifest import Session
from offload.sessions.saved import Sessions
from offload.sessions.sealed import packed, seal, unseal
from offload.sessions.store import KVStore
from offload.units import MIB, PAGE

TOKENS = [*range(600)]
HUGE = 1 << 60
Change = Callable[[bytes], bytes]


def fields(**changes: Any) -> Change:
    """Other fields, under a checksum that fits them."""

    def change(data: bytes) -> bytes:
        kind = data.partition(b" ")[0].decode()
        return seal(kind, 1, {**unseal(kind, 1, data), **changes})

    return change


def body(text: bytes) -> Change:
    """Another body, under a checksum that fits it."""
    return lambda data: b"%b 1 %b\n%b" % (data.partition(b" ")[0], xxh3_64_hexdigest(text).encode(), text)


def put(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


BROKEN: dict[str, Change] = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "cut in half": lambda data: data[: len(data) // 2],
    "a byte too long": lambda data: data + b" ",
    "random bytes": lambda data: random.Random(1).randbytes(5000),
    "no body": lambda data: data.partition(b"\n")[0],
    "the next version": lambda data: data.replace(b" 1 ", b" 2 ", 1),
    "another kind": lambda data: b"offload-else" + data[data.index(b" ") :],
    "a list": body(b"[]"),
    "no JSON": body(b"{nope}"),
    "100,000 brackets": body(b'{"tokens":' + b"[" * 100_000),
    "a number of 10,000 digits": body(b'{"capacity":' + b"9" * 10_000 + b"}"),
    "not UTF-8": body(b'{"a":"\xff"}'),
    "no fields": body(b"{}"),
    "tokens that are no text": fields(tokens=[1, 2]),
    "tokens that are no base64": fields(tokens="!!!!"),
    "half a token": fields(tokens="AAA="),
    "a token below zero": fields(tokens="/////w=="),
}
RECORDS: dict[str, Change] = {
    **BROKEN,
    "2^60 rows": fields(capacity=HUGE),
    "rows that are true": fields(capacity=True),
    "start at -1": fields(start=-1),
    "start at 2^60": fields(start=HUGE),
    "more tokens than checksums": fields(pieces=[[256, "0" * 16]]),
    "fewer tokens than checksums": fields(tokens=packed(token_ids([1, 2]))),
    "more tokens than room": fields(tokens=packed(token_ids(range(70_000)))),
    "a piece of 2^60 rows": fields(pieces=[[HUGE, "0" * 16]]),
    "pieces over two buckets": fields(pieces=[[200, "0" * 16]] * 3),
    "a piece of no rows": fields(pieces=[[0, "0" * 16]]),
    "a checksum that is a number": fields(pieces=[[256, 5]]),
    "pieces that are a number": fields(pieces=5),
    "the record of another segment": fields(id="0" * 16),
    "an id that is a path": fields(id="../../x"),
    "2^60 layers": fields(num_layers=HUGE),
    "other layers": fields(num_layers=3),
    "other heads": fields(num_heads=4),
    "other rows": fields(row_nbytes=48),
    "another model": fields(fingerprint="fedcba9876543210"),
    "another type": fields(kv_type="f32"),
    "another start": fields(start=1),
    "another past": fields(before="0" * 32),
    "another capacity": fields(capacity=1024),
    "other tokens": fields(tokens=packed(token_ids(range(1, 601)))),
}
SESSIONS: dict[str, Change] = {
    **BROKEN,
    "messages that are text": fields(messages="hello"),
    "a message without a role": fields(messages=[{"content": "x"}]),
    "a message with more": fields(messages=[{"role": "user", "content": "x", "tool": "y"}]),
    "a message that is a number": fields(messages=[5]),
    "a content that is a number": fields(messages=[{"role": "user", "content": 5}]),
    "references that are a number": fields(references=5),
    "a reference to a path": fields(references=[["../../x", 5]]),
    "a reference to 2^60 rows": fields(references=[["0" * 16, HUGE]]),
    "a model that is a number": fields(model=5),
    "a time that is none": fields(updated="\x1b[2J"),
    "a revision that is none": fields(revision=""),
}


def stored(folder: Path) -> tuple[Path, Path]:
    """A store of one segment of 600 rows: its record and its rows."""
    store = KVStore(folder, GEOMETRY, 64 * MIB, segment_rows=768)
    store.extend(Chain(), TOKENS, Computed(TOKENS).rows)
    store.close()
    record = next(path for path in files(folder) if path.suffix == RECORD)
    return record, record.with_suffix(ROWS)


def goes_on(folder: Path) -> None:
    """Nothing is found, and a conversation is stored as in an empty folder."""
    store = KVStore(folder, GEOMETRY, 64 * MIB, segment_rows=768)
    assert store.find(TOKENS).length == 0
    assert store.statistics().num_broken <= 1
    chain = store.extend(store.find(TOKENS), TOKENS, Computed(TOKENS).rows)
    assert restored(store, chain, TOKENS) == (len(TOKENS), "")
    assert store.find(TOKENS).length == len(TOKENS)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_lies_is_passed_over(tmp_path: Path, name: str) -> None:
    record, _ = stored(tmp_path)
    put(record, RECORDS[name](record.read_bytes()))
    goes_on(tmp_path)


@pytest.mark.parametrize("place", ["file", "link", "dangling link", "folder", "pipe"])
@pytest.mark.parametrize("which", [0, 1])
def test_something_else_in_place_of_a_file(tmp_path: Path, which: int, place: str) -> None:
    path = stored(tmp_path / "kv")[which]
    elsewhere = tmp_path / "elsewhere"
    path.replace(elsewhere)
    before = elsewhere.read_bytes()
    if place == "link":
        path.symlink_to(elsewhere)
    elif place == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif place == "folder":
        path.mkdir()
    elif place == "pipe":
        os.mkfifo(path)
    goes_on(tmp_path / "kv")
    assert elsewhere.read_bytes() == before  # never written through a link


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, 50_000, HUGE >> 20])
def test_rows_of_another_length(tmp_path: Path, size: int) -> None:
    _, rows = stored(tmp_path)
    os.truncate(rows, size)
    goes_on(tmp_path)


@pytest.mark.parametrize("page", [bytes(PAGE), b"\xff" * PAGE, random.Random(2).randbytes(PAGE)])
def test_rows_whose_first_page_is_anothers(tmp_path: Path, page: bytes) -> None:
    _, rows = stored(tmp_path)
    with rows.open("r+b") as file:
        file.write(page)
    goes_on(tmp_path)


def test_rows_of_one_segment_in_the_place_of_another(tmp_path: Path) -> None:
    _, first = stored(tmp_path)
    store = KVStore(tmp_path, GEOMETRY, 64 * MIB, segment_rows=768)
    other = [7, *TOKENS]
    second = store.extend(Chain(), other, Computed(other).rows).links[0].file.path
    store.close()
    second.replace(first)
    goes_on(tmp_path)


def test_any_byte_of_a_record_or_a_session_is_missed(tmp_path: Path) -> None:
    record, _ = stored(tmp_path / "kv")
    sessions = Sessions(tmp_path / "sessions")
    tokens = token_ids(TOKENS[:20])
    sessions.save(Session(name="a", model="m", fingerprint="f", tokens=tokens))
    session = tmp_path / "sessions" / "a.session"
    for path in (record, session):
        data = path.read_bytes()
        for place in range(len(data)):
            put(path, data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
            if path is session:
                with pytest.raises(CheckpointError):
                    sessions.load("a")
            elif place % 10 == 0:
                assert KVStore(tmp_path / "kv", GEOMETRY, 64 * MIB).find(TOKENS).length == 0


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_that_lies_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    sessions = Sessions(tmp_path)
    saved = sessions.save(Session(name="mine", model="m", fingerprint="f", tokens=token_ids(TOKENS)))
    path = tmp_path / "mine.session"
    put(path, SESSIONS[name](path.read_bytes()))
    with pytest.raises(CheckpointError, match="mine") as refused:
        sessions.load("mine")
    assert "\n" not in str(refused.value) and str(refused.value).isprintable()
    assert [(line.name, line.problem) for line in sessions.list()] == [("mine", str(refused.value))]
    assert sessions.segments() == frozenset()
    sessions.save(saved)  # what is in memory is not lost to what is on disk
    assert list(sessions.load("mine").tokens) == TOKENS


def test_a_link_in_the_place_of_a_session(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path / "sessions")
    sessions.save(Session(name="mine", model="m", fingerprint="f"))
    path = tmp_path / "sessions" / "mine.session"
    path.replace(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        sessions.load("mine")


@pytest.mark.parametrize(
    "wrong",
    [{"fingerprint": "../x"}, {"fingerprint": "ABCDEF01"}, {"kv_type": ""}, {"kv_type": "a/b"}, {"num_layers": 0},
     {"num_heads": True}, {"row_nbytes": -1}],
)  # fmt: skip
def test_a_geometry_that_cannot_be(wrong: dict[str, Any]) -> None:
    right = {"fingerprint": "0123456789abcdef", "kv_type": "f16", "num_layers": 2, "num_heads": 3, "row_nbytes": 40}
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Geometry(**{**right, **wrong})


@pytest.mark.parametrize("tokens", [[-1], [1 << 31], ["x"], [1 << 70]])
def test_what_is_no_token(tmp_path: Path, tokens: list[Any]) -> None:
    with pytest.raises(UsageError, match="tokens"):
        KVStore(tmp_path, GEOMETRY, 64 * MIB).find(tokens)
