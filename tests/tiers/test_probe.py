"""Probes: figures of a link whose speed is known, tables of real files, and folders without room."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from offload.errors import StorageError
from offload.tiers import probe
from offload.tiers.files import LocalStorage
from offload.tiers.probe import measure_disk, measure_ram, probe_disk
from offload.tiers.wrapper import RealClock, ThrottledStorage
from offload.units import KIB, MIB


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(3 * MIB + 5))
    return path


def test_a_known_link_is_measured_as_it_is(file):
    storage = ThrottledStorage(LocalStorage(), 50e6, 0.0, RealClock())
    bandwidth = measure_disk(file, seconds=0.5, read_bytes=256 * KIB, workers=2, storage=storage)
    assert bandwidth == pytest.approx(50e6, rel=0.15)


def test_a_file_smaller_than_a_request(tmp_path):
    (tmp_path / "tiny").write_bytes(b"x" * 100)
    assert measure_disk(tmp_path / "tiny", seconds=0.02) > 0


def test_an_empty_file_cannot_be_measured(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(StorageError, match="an empty file cannot be measured"):
        measure_disk(tmp_path / "empty")


def test_a_missing_file(tmp_path):
    with pytest.raises(StorageError, match="cannot be opened"):
        probe_disk(tmp_path / "missing")


def test_the_table_has_every_size_and_depth(file):
    report = probe_disk(file, seconds=0.01)
    assert {(point.read_bytes, point.depth) for point in report.points} == {
        (size, depth) for size in probe.SIZES for depth in probe.DEPTHS
    }
    assert report.best.bandwidth_bps == max(point.bandwidth_bps for point in report.points) > 0
    assert report.path == file


def test_a_folder_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "FILE_BYTES", 16 * MIB)
    report = probe_disk(tmp_path, seconds=0.01)
    assert len(report.points) == len(probe.SIZES) * len(probe.DEPTHS)
    assert report.path == tmp_path and not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_and_left_as_it_was(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(probe.os, "fsync", full)
    monkeypatch.setattr(probe, "FILE_BYTES", 8 * MIB)
    with pytest.raises(StorageError, match=r"No space left on device; free some space") as caught:
        probe_disk(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_every_place_of_the_file_is_visited_before_any_comes_again(file):
    extents = probe._extents(file, MIB)
    first, second = ([next(extents).offset for _ in range(3)] for _ in range(2))
    assert sorted(first) == sorted(second) == [0, MIB, 2 * MIB]


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_memory_has_a_speed(threads):
    assert 1e8 < measure_ram(32 * MIB, threads=threads) < 1e13


def test_a_folder_that_cannot_be_written(monkeypatch):
    if not Path("/proc").is_dir():
        pytest.skip("no /proc")
    with pytest.raises(StorageError, match="/proc: writing a probe file"):
        probe_disk(Path("/proc"))
