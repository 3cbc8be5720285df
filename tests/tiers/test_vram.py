"""The device tier on torch:cpu, and on CUDA where there is one."""

from __future__ import annotations

import random

import pytest
import torch

from offload.errors import AllocationError, Cancelled, StorageError
from offload.tiers.base import CancelToken
from offload.tiers.ram import Slab
from offload.tiers.vram import DeviceTier, _DeviceHandle
from offload.units import MIB, PAGE

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def tier(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tier = DeviceTier(request.param, 4 * MIB + 100)
    yield tier
    tier.close()
    tier.close()


def test_bytes_arrive_where_they_were_sent(tier, slab):
    data = random.Random(1).randbytes(MIB)
    slab.view(0, MIB)[:] = data
    offset = tier.allocate(MIB)
    second = tier.allocate(MIB)
    handle = tier.copy_in(slab.view(0, MIB), second)
    handle.wait()
    assert handle.done() and handle.nbytes == MIB and handle.error is None
    assert bytes(tier.view(second, MIB).cpu().numpy()) == data
    assert second >= offset + MIB


def test_a_view_shares_the_arena(tier):
    tier.view(0, 8).fill_(3)
    assert tier.view(4, 8).tolist() == [3, 3, 3, 3, *tier.view(8, 4).tolist()]


def test_offsets_are_page_aligned_and_the_arena_ends(tier):
    assert [tier.allocate(1), tier.allocate(PAGE), tier.allocate(PAGE + 1), tier.allocate(1)] == [
        0,
        PAGE,
        2 * PAGE,
        4 * PAGE,
    ]
    with pytest.raises(AllocationError, match=r"4\.00 MiB needed, 3\.98 MiB of 4\.00 MiB left; raise --vram"):
        tier.allocate(4 * MIB)
    assert tier.allocate(tier.capacity_bytes - 5 * PAGE) == 5 * PAGE
    assert tier.statistics().allocated_bytes == tier.capacity_bytes


def test_statistics(tier, slab):
    tier.copy_in(slab.view(0, PAGE), tier.allocate(PAGE)).wait()
    statistics = tier.statistics()
    assert (statistics.capacity_bytes, statistics.allocated_bytes) == (4 * MIB + 100, PAGE)
    assert statistics.copies.bytes == PAGE and statistics.copies.busy_s > 0


@pytest.mark.parametrize("window", [(-1, 1), (0, 4 * MIB + 101), (4 * MIB + 100, 1)])
def test_views_stay_inside(tier, window):
    with pytest.raises(AssertionError):
        tier.view(*window)


def test_an_arena_too_large_is_refused():
    with pytest.raises(AllocationError, match=r"cpu refused .* lower --vram"):
        DeviceTier("cpu", 2**60)


def test_copying_on_the_cpu_holds_no_extra_memory():
    import psutil

    source, tier = Slab(128 * MIB), DeviceTier("cpu", 128 * MIB)
    tier.view(0, 128 * MIB).fill_(1)
    before = psutil.Process().memory_info().rss
    tier.copy_in(source.view(0, 128 * MIB), 0).wait()
    assert psutil.Process().memory_info().rss - before < 16 * MIB
    assert not tier.view(0, 128 * MIB).any()
    tier.close()
    source.close()


class FakeEvent:
    """A CUDA event that is ready at the n-th look."""

    def __init__(self, ready_at):
        self.looks, self.ready_at = 0, ready_at

    def query(self):
        self.looks += 1
        return self.looks >= self.ready_at


class FakeStream:
    """Writes down what is queued on it, in the order in which the host does so."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.events += 1
        self.log.append(f"{self.name} records {self.events}")
        return f"{self.name} {self.events}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def synchronize(self):
        self.log.append(f"the host waits for {self.name}")

    def __enter__(self):
        self.log.append("{")

    def __exit__(self, *error):
        self.log.append("}")


def test_kernels_wait_for_copies_and_the_host_does_not(slab, monkeypatch):
    tier, log = DeviceTier("cpu", MIB), []
    tier._stream = FakeStream("copies", log)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: FakeStream("kernels", log))
    monkeypatch.setattr("torch.cuda.stream", lambda stream: stream)
    slab.view(0, 2 * PAGE)[:] = b"\x05" * PAGE + b"\x06" * PAGE
    first = tier.copy_parts([(slab.view(0, PAGE), PAGE), (slab.view(PAGE, PAGE), 0)])
    second = tier.copy_in(slab.view(0, PAGE), 2 * PAGE)
    tier.order(second)
    tier.order(first)
    assert log == [
        "copies waits for kernels", "{", "copies records 1", "}", "copies waits for kernels", "{", "copies records 2", "}",
        "kernels waits for copies 2", "kernels waits for copies 1",
    ]  # fmt: skip
    assert bytes(tier.view(0, 3 * PAGE).numpy()) == b"\x06" * PAGE + b"\x05" * (2 * PAGE)
    assert (first.nbytes, tier.statistics().copies.bytes) == (2 * PAGE, 3 * PAGE)
    del log[:]
    tier.drain()
    assert log == ["the host waits for copies"]


def test_a_device_handle_polls_until_the_event():
    handle = _DeviceHandle(torch.device("cpu"), [torch.zeros(5, dtype=torch.uint8)], FakeEvent(4))
    assert not handle.done()
    handle.wait()
    assert handle.done() and handle.nbytes == 5


def test_a_device_handle_can_be_cancelled_and_times_out():
    handle, token = (
        _DeviceHandle(torch.device("cpu"), [torch.zeros(5, dtype=torch.uint8)], FakeEvent(10**9)),
        CancelToken(),
    )
    with pytest.raises(StorageError, match=r"0 of 5 bytes done within 0\.02 s"):
        handle.wait(token, timeout_s=0.02)
    token.cancel()
    with pytest.raises(Cancelled):
        handle.wait(token)


@pytest.mark.gpu
def test_a_copy_waits_for_kernels_queued_before_it(slab):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tier = DeviceTier("cuda", 64 * MIB)
    out = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    tier.view(0, 64 * MIB).fill_(1)
    torch.cuda._sleep(50_000_000)
    out.copy_(tier.view(0, 64 * MIB))
    slab.view(0, MIB)[:] = b"\x02" * MIB
    tier.copy_in(slab.view(0, MIB), 0).wait()
    assert out[:MIB].eq(1).all() and tier.view(0, MIB).eq(2).all()
    tier.close()
