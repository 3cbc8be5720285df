"""The wrappers themselves: a virtual link takes exactly the time that its figures say."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.tiers.base import Reader
from offload.tiers.memory import FakeStorage, MemoryReader
from offload.tiers.nvme import NvmeReader
from offload.tiers.wrapper import Fault, FaultyStorage, RealClock, ThrottledStorage, VirtualClock
from offload.units import PAGE

NAME = Path("model.bin")


@pytest.fixture
def storage():
    return FakeStorage({NAME: bytes(4 * PAGE)})


def test_a_virtual_link_is_exact(storage):
    clock = VirtualClock()
    file = ThrottledStorage(storage, bandwidth_bps=PAGE, latency_s=0.5, clock=clock).open(NAME)
    file.read_into(memoryview(bytearray(2 * PAGE)), 0)
    assert clock.now() == 2.5
    file.read_into(memoryview(bytearray(2 * PAGE)), 3 * PAGE)  # one page is left
    assert clock.now() == 4.0


def test_time_never_runs_backwards():
    clock = VirtualClock()
    clock.sleep_until(2.0)
    clock.sleep_until(1.0)
    assert clock.now() == 2.0


def test_a_real_clock_sleeps():
    clock = RealClock()
    start_s = clock.now()
    clock.sleep_until(start_s + 0.02)
    clock.sleep_until(start_s)
    assert clock.now() - start_s >= 0.02


def test_truncation_stays_and_spares_other_reads(storage):
    faulty = FaultyStorage(storage, [Fault(at=2, kind="truncated")])
    file, buffer = faulty.open(NAME), memoryview(bytearray(PAGE))
    assert [file.read_into(buffer, 0) for _ in range(3)] == [PAGE, 0, 0]
    assert faulty.reads == 3


def test_wrapped_files_are_transparent(storage):
    for file in (FaultyStorage(storage, []).open(NAME), ThrottledStorage(storage, 1e9, 0, VirtualClock()).open(NAME)):
        assert (file.path, file.nbytes, file.direct, file.changed()) == (NAME, 4 * PAGE, False, None)
        file.close()


def test_both_readers_satisfy_the_protocol(storage):
    readers: list[Reader] = [MemoryReader(storage, [NAME]), NvmeReader(storage, [NAME], 1)]
    for reader in readers:
        assert reader.cancel_pending() == 0
        reader.drain()
        reader.close()
