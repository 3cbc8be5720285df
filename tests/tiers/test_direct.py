"""kvikio is set up once and told apart by its mode; every byte count is checked, and an error is one line."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from support.fake_kvikio import FakeKvikio, install

from offload.blocks import Extent
from offload.errors import StorageError
from offload.tiers import direct
from offload.tiers.direct import DirectReader, describe_kvikio, load_kvikio
from offload.tiers.files import File, LocalStorage

DATA = random.Random(5).randbytes(100_000)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    made = FakeKvikio()
    install(made, monkeypatch)
    return made


class Files:
    def __init__(self, path: Path) -> None:
        self._file = LocalStorage().open(path)

    def file(self, path: Path) -> File:
        assert path == self._file.path
        return self._file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(DATA)
    return tmp_path / "model.gguf"


def reader_of(path: Path) -> DirectReader:
    kvikio = load_kvikio("cuda")
    assert kvikio is not None
    return DirectReader(kvikio, Files(path))


def wanted(path: Path, count: int = 9) -> list[tuple[Extent, torch.Tensor]]:
    extents = [Extent(path=path, offset=77 + 10_000 * i, nbytes=9_000 + i) for i in range(count)]
    return [(extent, torch.zeros(extent.nbytes, dtype=torch.uint8)) for extent in extents]


@pytest.mark.parametrize(
    ("compat", "gds", "mode"),
    [(False, True, "direct"), (True, True, "compat"), (False, False, "compat"), (True, False, "compat")],
)
def test_what_it_is_and_how_it_is_set_up(
    fake: FakeKvikio, monkeypatch: pytest.MonkeyPatch, compat: bool, gds: bool, mode: str
) -> None:
    fake.compat, fake.gds = compat, gds
    install(fake, monkeypatch)
    assert describe_kvikio() == {"version": "26.10.0", "mode": mode}
    assert fake.settings["auto_direct_io_read"] is True and fake.settings["bounce_buffer_size"] <= 4 * 1024**2


def test_one_that_is_missing_or_broken_is_none(fake: FakeKvikio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["kvikio.defaults"], "is_compat_mode_preferred")
    assert load_kvikio("cuda") is None
    monkeypatch.setitem(sys.modules, "kvikio", None)
    assert load_kvikio("cuda") is None and describe_kvikio() == {"version": None, "mode": None}


def test_it_is_not_even_imported_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "import_module", None)
    assert load_kvikio("cpu") is None


def test_bytes_arrive_and_everything_is_closed(fake: FakeKvikio, path: Path) -> None:
    reader, pairs = reader_of(path), wanted(path)
    reader.read(pairs)
    reader.close()
    reader.close()
    for extent, target in pairs:
        assert bytes(target.numpy()) == DATA[extent.offset : extent.end]
    assert fake.reads == [(extent.offset, extent.nbytes) for extent, _ in pairs] and not fake.unfinished
    assert fake.opened == fake.closed == [str(path)] and fake.freed


def refuse(number: int, nbytes: int) -> int:
    if number == 3:
        raise RuntimeError("cuFile error at file_handle.cpp:1:\nCU_FILE_IO_ERROR")
    return nbytes


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda number, nbytes: nbytes - (number == 3), "it ended after 9002"),
        (refuse, "cuFile error at file_handle.cpp:1:"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing_in_flight(fake: FakeKvikio, path: Path, answer, words: str) -> None:
    fake.answer = answer
    with pytest.raises(
        StorageError, match=f"reading 9003 bytes at offset 30077 to the device by kvikio failed: {words}"
    ) as caught:
        reader_of(path).read(wanted(path))
    assert "\n" not in str(caught.value) and not fake.unfinished and 4 <= len(fake.reads) < 9


def test_a_read_that_never_ends_is_given_up(fake: FakeKvikio, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "TIMEOUT_S", 0.02)
    fake.finishes = lambda number: number != 1
    with pytest.raises(StorageError, match=r"no answer within 0\.02 s"):
        reader_of(path).read(wanted(path))


def test_a_file_that_changed_is_named(fake: FakeKvikio, path: Path) -> None:
    reader = reader_of(path)
    path.write_bytes(DATA[:-1] + b"x" * 9)
    with pytest.raises(StorageError, match="its size went from 100000 to 100008 bytes while it was in use"):
        reader.read(wanted(path))
    with pytest.raises(StorageError, match="bytes 99999 to 100001 wanted, the file has 100000"):
        reader.read([(Extent(path=path, offset=99_999, nbytes=2), torch.zeros(2, dtype=torch.uint8))])
