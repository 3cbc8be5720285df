"""Slabs: alignment, pages that are really there, refusals before the kernel must kill, and freeing."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from offload.errors import AllocationError
from offload.tiers import ram
from offload.tiers.ram import HUGE_PAGE, Slab
from offload.units import MIB, PAGE, format_size


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("nbytes", [1, PAGE, 3 * MIB + 5, 300 * MIB])
def test_a_slab_is_aligned_zeroed_and_writable_to_its_last_byte(nbytes):
    slab = Slab(nbytes)
    assert slab.address % HUGE_PAGE == 0
    assert nbytes <= slab.nbytes < nbytes + PAGE
    last = slab.view(slab.nbytes - 1, 1)
    assert last[0] == 0
    last[0] = 7
    assert np.frombuffer(slab.view(0, slab.nbytes), np.uint8)[-1] == 7
    slab.close()


def test_a_view_lies_where_it_says():
    slab = Slab(4 * MIB)
    view = np.frombuffer(slab.view(MIB, PAGE), np.uint8)
    assert view.ctypes.data == slab.address + MIB
    slab.close()


@pytest.mark.parametrize("window", [(-1, 1), (0, PAGE + 1), (PAGE, 1), (1, -1)])
def test_views_stay_inside(window):
    slab = Slab(PAGE)
    with pytest.raises(AssertionError):
        slab.view(*window)
    slab.close()


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages as Linux does")
def test_prefault_makes_pages_resident_and_close_gives_them_back(by_kernel, monkeypatch):
    if not by_kernel:
        monkeypatch.setattr(ram, "MADV_POPULATE_WRITE", 9999)  # an older kernel: EINVAL
    before = resident()
    slab = Slab(64 * MIB, huge_pages=False)
    assert resident() - before > 60 * MIB
    held = slab.view(0, PAGE)
    slab.close()
    slab.close()
    assert resident() - before < 8 * MIB
    assert held[0] == 0


def test_without_prefault_nothing_is_touched():
    before = resident()
    slab = Slab(64 * MIB, prefault=False)
    assert resident() - before < 8 * MIB
    slab.close()


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.skipif(not ram.CAN_DISCARD, reason="this system does not give parts of a mapping back")
def test_a_range_is_made_resident_and_given_back_without_touching_its_neighbours(by_kernel, monkeypatch):
    if not by_kernel:
        monkeypatch.setattr(ram, "MADV_POPULATE_WRITE", 9999)
    before = resident()
    slab = Slab(64 * MIB, huge_pages=False, prefault=False)
    slab.populate(16 * MIB, 32 * MIB)
    assert 30 * MIB < resident() - before < 36 * MIB
    whole = np.frombuffer(slab.view(0, slab.nbytes), np.uint8)
    whole[16 * MIB : 48 * MIB] = 5
    slab.discard(20 * MIB, 20 * MIB)
    assert resident() - before < 18 * MIB
    assert whole[20 * MIB - 1] == whole[40 * MIB] == 5
    assert whole[20 * MIB] == whole[40 * MIB - 1] == 0
    slab.discard(0, 0)
    slab.close()
    slab.discard(0, PAGE)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc")
@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages")
def test_huge_pages_are_used_when_asked_for():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("huge pages are off on this machine")
    slab = Slab(32 * MIB)
    huge = _huge_bytes_at(slab.address)
    slab.close()
    assert huge >= 16 * MIB


def test_more_than_the_machine_has_is_refused_before_it_is_touched(monkeypatch):
    monkeypatch.setattr(ram, "available_memory", lambda: 10 * MIB)
    with pytest.raises(AllocationError) as caught:
        Slab(10 * MIB + 1)
    assert caught.value.needed_bytes == 10 * MIB + PAGE and caught.value.available_bytes == 10 * MIB
    for part in (format_size(10 * MIB + PAGE), format_size(10 * MIB), "lower --ram"):
        assert part in str(caught.value)


@pytest.mark.parametrize("prefault", [True, False])
@pytest.mark.parametrize("nbytes", [2**46, 2**62, 2**64])
def test_absurd_sizes_are_refused(nbytes, prefault):
    with pytest.raises(AllocationError, match="needed"):
        Slab(nbytes + 2**47, prefault=prefault)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel populates on Linux only")
def test_a_kernel_that_runs_out_while_touching(monkeypatch):
    class Refusing:
        def madvise(self, address, nbytes, advice):
            assert advice == ram.MADV_POPULATE_WRITE
            ctypes.set_errno(errno.ENOMEM if address.value >= refused_from else 0)
            return -1 if address.value >= refused_from else 0

    refused_from = 0
    monkeypatch.setattr(ram, "_libc", Refusing)
    with pytest.raises(AllocationError, match="Cannot allocate memory"):
        Slab(PAGE)
    slab = Slab(3 * ram.POPULATE_STEP, prefault=False)
    refused_from = slab.address + 2 * ram.POPULATE_STEP  # one thread of several
    with pytest.raises(AllocationError, match="Cannot allocate memory"):
        slab.populate(0, slab.nbytes)


def _huge_bytes_at(address: int) -> int:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0
