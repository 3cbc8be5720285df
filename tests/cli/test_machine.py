import json
from dataclasses import replace

import pytest

from offload import machine
from offload.errors import StorageError
from offload.machine import MachineProfile, host_fingerprint, load_machine, save_machine


@pytest.fixture
def profile():
    return MachineProfile(
        host=host_fingerprint(),
        disks_bps={"64512": 1.5e9},
        ram_bps=20e9,
        kernel_bps={"Q4_K": 16.6e9},
        measured_at="2026-11-21T00:00:00",
        links_bps={"Card 5090": 50e9},
    )


def test_a_saved_profile_is_read_again_from_the_cache_folder(profile):
    assert load_machine() is None
    path = save_machine(profile)
    assert path == machine.profile_path() and load_machine() == profile
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]


def test_the_profile_of_another_machine_is_ignored(profile, tmp_path):
    save_machine(replace(profile, host="elsewhere"), tmp_path / "machine.json")
    assert load_machine(tmp_path / "machine.json") is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"disks_bps": {"64512": 0}},
        {"disks_bps": {"64512": "fast"}},
        {"disks_bps": None},
        {"ram_bps": float("nan")},
        {"kernel_bps": [1]},
        {"kernel_bps": {"Q4_K": -1}},
        {"measured_at": 7},
        {"links_bps": None},
        {"links_bps": {"Card 5090": -1}},
    ],
)
def test_a_record_that_cannot_be_is_no_profile(profile, tmp_path, change):
    path = save_machine(profile, tmp_path / "machine.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load_machine(path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]"])
def test_a_broken_file_is_no_profile(tmp_path, content):
    (tmp_path / "machine.json").write_bytes(content)
    assert load_machine(tmp_path / "machine.json") is None


def test_a_failed_write_keeps_the_old_profile_and_leaves_nothing(profile, tmp_path, monkeypatch):
    path = save_machine(profile, tmp_path / "machine.json")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offload.writing.os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save_machine(replace(profile, ram_bps=1.0), path)
    monkeypatch.undo()
    assert load_machine(path) == profile and [file.name for file in tmp_path.iterdir()] == ["machine.json"]
