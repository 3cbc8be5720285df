"""A file appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offload.writing import PRIVATE, beside


def only(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("before", [None, b"old"])
def test_what_is_written_takes_the_place_at_the_end(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)
    with beside(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert (path.read_bytes() if path.exists() else None) == before
    assert only(tmp_path) == {"a.bin": b"new"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_what_ends_badly_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write() -> None:
        with beside(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert only(tmp_path) == {"a.bin": b"old"}


def test_a_sync_that_fails_is_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offload.writing.os.fsync", full)
    with pytest.raises(OSError, match="No space"), beside(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"new")
    assert only(tmp_path) == {}


def test_what_appeared_meanwhile_stays_where_only_a_new_file_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def write() -> None:
        with beside(path, new=True) as temporary:
            temporary.write_bytes(b"ours")
            path.write_bytes(b"theirs")

    with pytest.raises(FileExistsError):
        write()
    assert only(tmp_path) == {"a.bin": b"theirs"}


def test_two_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with beside(path) as first:
        first.write_bytes(b"first, unfinished")
        with beside(path) as second:
            assert second != first
            second.write_bytes(b"second")
        first.write_bytes(b"first")
    assert only(tmp_path) == {"a.bin": b"first"}


def test_what_is_private_is_the_owners(tmp_path: Path) -> None:
    for mode, expected in ((PRIVATE, 0o600), (0o666, 0o666 & ~0o022)):
        before = os.umask(0o022)
        try:
            with beside(tmp_path / "a.bin", mode=mode):
                pass
        finally:
            os.umask(before)
        assert (tmp_path / "a.bin").stat().st_mode & 0o777 == expected


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), beside(tmp_path / "none" / "a.bin"):
        pass
