"""Reads that go wrong, and the page cache that a header leaves behind."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from support.headers import Gguf, tensor

from offload.errors import CheckpointError, StorageError
from offload.models.checkpoint import open_checkpoint, reader
from offload.models.checkpoint.reader import HeaderReader, is_name, one_line, quote


class FaultyFile:
    """A raw file that serves `pieces` in order; an OSError among them is raised."""

    def __init__(self, pieces: list[bytes | OSError]) -> None:
        self._pieces = pieces

    def read(self, limit: int) -> bytes:
        piece = self._pieces.pop(0)
        if isinstance(piece, OSError):
            raise piece
        assert len(piece) <= limit
        return piece


def faulty(path: Path, *pieces: bytes | OSError) -> HeaderReader:
    path.write_bytes(bytes(100))
    opened = HeaderReader(path, limit_bytes=1000)
    opened._file.close()
    opened._file = FaultyFile(list(pieces))  # type: ignore[assignment]
    return opened


def test_short_reads_are_continued(tmp_path: Path) -> None:
    opened = faulty(tmp_path / "f", b"ab", b"c", b"defgh")
    assert opened.take(6, "text") == b"abcdef"
    assert opened.unpack(struct.Struct("<H"), "number") == (0x6867,)


def test_a_file_that_shrinks_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="ends at byte 2, had 100 when opened") as caught:
        faulty(tmp_path / "f", b"ab", b"").take(6, "text")
    assert (caught.value.path, caught.value.offset) == (str(tmp_path / "f"), 2)


def test_a_disk_error_carries_the_place(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="failed at offset 2: Input/output error") as caught:
        faulty(tmp_path / "f", b"ab", OSError(errno.EIO, os.strerror(errno.EIO))).take(6, "text")
    assert (caught.value.offset, caught.value.errno) == (2, errno.EIO)


def test_a_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(Gguf().build())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)  # root may open everything
    with pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
        open_checkpoint(tmp_path / "model.gguf")


def test_nothing_is_read_past_the_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    with HeaderReader(tmp_path / "f", limit_bytes=10) as opened:
        opened.take(10, "text")
        with pytest.raises(CheckpointError, match="reaches to byte 11 and at most 10 are read"):
            opened.take(1, "text")


def test_a_header_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = Gguf(tensors=(tensor("t" * 100, [8]), tensor("u", [8], offset=32)), data=bytes(64)).build()
    (tmp_path / "model.gguf").write_bytes(built)
    expected = open_checkpoint(tmp_path)
    monkeypatch.setattr(reader, "PIECE_BYTES", 7)
    assert open_checkpoint(tmp_path) == expected


def test_no_file_stays_open(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(Gguf().build())
    (tmp_path / "bad.gguf").write_bytes(Gguf(version=1).build())
    files = []
    unpatched = Path.open

    def remember(path: Path, *args: Any, **options: Any) -> Any:
        files.append(unpatched(path, *args, **options))
        return files[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", remember)
        open_checkpoint(tmp_path / "model.gguf")
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "bad.gguf")
    assert len(files) == 4
    assert all(file.closed for file in files)


@pytest.mark.parametrize(
    "value", ["x" * 10_000, b"\xff" * 10_000, list(range(10_000)), {"a": [[[["x" * 9999]]]]}, 10**30]
)
def test_what_is_quoted_is_short_and_printable(value: object) -> None:
    assert len(quote(value)) < 500
    assert quote(value).isascii()
    assert quote("\x1b[31m\u202eé\n") == r"'\x1b[31m\u202e\xe9\n'"


def test_nested_values_are_short_as_well() -> None:
    value: object = "x" * 1_000
    for _ in range(5):
        value = [value] * 6
    assert len(quote(value)) <= 300


def test_words_of_a_file_are_one_printable_line() -> None:
    assert one_line("rôles\n must\talternate\x1b[2J\u202e") == "rôles must alternate\\x1b[2J\\u202e"
    assert len(one_line("x" * 10**6)) == len(one_line("\x1b" * 10**6)) == 300


@pytest.mark.parametrize("value", ["", "x" * 97, "a\x1b", "a\nb", "\u00e9", "\ud800", None, 1, ["llama"]])
def test_what_is_no_name(value: object) -> None:
    assert not is_name(value)
    assert is_name("gemma3_text")
