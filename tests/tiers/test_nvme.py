"""The reader: its contract with the plain reference, faults at every read, cancellation, changed files, threads."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from offload.blocks import Extent
from offload.errors import Cancelled, ClosedError, StorageError
from offload.tiers.base import CancelToken
from offload.tiers.engines import AioEngine
from offload.tiers.files import LocalStorage
from offload.tiers.memory import FakeStorage, MemoryReader
from offload.tiers.nvme import NvmeReader
from offload.tiers.wrapper import Fault, FaultyStorage, ThrottledStorage, VirtualClock
from offload.units import PAGE

A, B = Path("a.gguf"), Path("b.gguf")
WORKERS = 2


def workers_alive() -> int:
    return sum(thread.name.startswith("offload-nvme-") for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = workers_alive()
    yield
    assert workers_alive() == before


@pytest.fixture(scope="module")
def contents():
    generator = random.Random(3)
    return {A: generator.randbytes(9 * PAGE + 17), B: generator.randbytes(3 * PAGE)}


def whole(path, contents) -> Extent:
    return Extent(path=path, offset=0, nbytes=len(contents[path]))


class ReaderContract:
    """What `NvmeReader` and `MemoryReader` have in common."""

    @pytest.fixture
    def storage(self, contents):
        return FakeStorage(contents)

    @pytest.fixture
    def reader(self, storage):
        reader = self.make(storage)
        yield reader
        reader.close()

    @pytest.mark.parametrize("path", [A, B])
    def test_any_extent_arrives(self, reader, slab, contents, path):
        size = len(contents[path])
        borders = {place + step for place in range(0, size + PAGE, PAGE) for step in (-1, 0, 1)} | {size}
        places = sorted(place for place in borders if 0 <= place <= size)
        for offset, end in combinations_with_replacement(places, 2):
            extent = Extent(path=path, offset=offset, nbytes=end - offset)
            destination = slab.view(0, extent.window_nbytes)
            handle = reader.read_extent(extent, destination)
            handle.wait()
            assert handle.done() and handle.error is None
            assert bytes(destination[extent.lead : extent.lead + extent.nbytes]) == contents[path][offset:end]

    def test_many_at_once(self, reader, slab, contents):
        extents = [Extent(path=A, offset=PAGE * n, nbytes=PAGE) for n in range(9)]
        handles = [reader.read_extent(extent, slab.view(extent.offset, PAGE)) for extent in extents]
        for handle in handles:
            handle.wait()
        assert bytes(slab.view(0, 9 * PAGE)) == contents[A][: 9 * PAGE]

    def test_an_extent_past_the_end_is_refused_before_any_read(self, reader, slab, contents):
        extent = Extent(path=B, offset=2 * PAGE, nbytes=PAGE + 1)
        with pytest.raises(StorageError, match=r"b\.gguf: bytes 8192 to 12289 wanted, the file has 12288"):
            reader.read_extent(extent, slab.view(0, extent.window_nbytes))

    @pytest.mark.parametrize("data", [b"", b"x" * (9 * PAGE + 17)])
    def test_a_changed_file_fails_the_read(self, reader, storage, slab, contents, data):
        storage.write(A, data)
        handle = reader.read_extent(whole(A, contents), slab.view(0, 10 * PAGE))
        with pytest.raises(StorageError, match=r"a\.gguf: it(s size went| was written).* load the model again"):
            handle.wait()
        with pytest.raises(StorageError, match="while it was in use"):
            reader.check_files()
        reader.read_extent(whole(B, contents), slab.view(0, 3 * PAGE)).wait()

    def test_statistics_count_bytes(self, reader, slab, contents):
        reader.read_extent(whole(A, contents), slab.view(0, 10 * PAGE)).wait()
        reader.drain()
        assert reader.statistics().bytes == 10 * PAGE

    def test_untouched_files_pass_the_check(self, reader):
        reader.check_files()

    def test_close_is_idempotent(self, reader):
        reader.close()
        reader.close()


class TestMemoryReader(ReaderContract):
    def make(self, storage):
        return MemoryReader(storage, [A, B])


class TestNvmeReader(ReaderContract):
    def make(self, storage):
        return NvmeReader(storage, [A, B], WORKERS, read_bytes=2 * PAGE)


class Disk(LocalStorage):
    """Real files, in the working folder."""

    def __init__(self, contents):
        super().__init__()
        for path, data in contents.items():
            self.write(path, data)

    def write(self, path, data):
        path.write_bytes(data)


class TestNativeReader(ReaderContract):
    """The same, by the kernel's asynchronous reads."""

    @pytest.fixture
    def storage(self, contents, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        return Disk(contents)

    def make(self, storage):
        reader = NvmeReader(storage, [A, B], WORKERS, read_bytes=2 * PAGE)
        if not isinstance(reader._engine, AioEngine):
            reader.close()
            pytest.skip("no native asynchronous reads here")
        return reader


@pytest.fixture
def build():
    """Makes readers with small pieces, and closes them."""
    readers = []

    def make(storage, workers=WORKERS, paths=(A, B), **rest):
        readers.append(NvmeReader(storage, paths, workers, read_bytes=2 * PAGE, **rest))
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()


def test_local_files_by_direct_io(build, tmp_path, slab, contents):
    path = tmp_path / "a"
    path.write_bytes(contents[A])
    reader = build(LocalStorage(), paths=[path])
    extent = Extent(path=path, offset=1000, nbytes=8 * PAGE)
    reader.read_extent(extent, slab.view(PAGE, extent.window_nbytes)).wait()
    assert bytes(slab.view(PAGE + extent.lead, extent.nbytes)) == contents[A][1000 : 1000 + 8 * PAGE]
    path.write_bytes(contents[A][:PAGE])
    with pytest.raises(StorageError, match=f"its size went from {len(contents[A])} to {PAGE}"):
        reader.read_extent(extent, slab.view(PAGE, extent.window_nbytes)).wait()


@pytest.mark.parametrize("kind", ["eio", "enospc", "truncated"])
def test_the_nth_read_fails_for_every_n(build, slab, contents, kind):
    """Fails once at read n; the next request is served well, by workers that are all alive."""
    for n in range(1, 7):
        storage = FaultyStorage(FakeStorage(contents), [Fault(at=n, kind=kind)])
        reader = build(storage)
        handle = reader.read_extent(whole(A, contents), slab.view(0, 10 * PAGE))
        if n == 6:  # five pieces: this extent is read before anything fails
            handle.wait()
            break
        with pytest.raises(StorageError, match=r"a\.gguf: reading \d+ bytes at offset \d+ stopped after 0"):
            handle.wait()
        assert handle.done() and storage.reads == 5
        reader.read_extent(whole(B, contents), slab.view(0, 3 * PAGE)).wait()
        assert bytes(slab.view(0, 3 * PAGE)) == contents[B]
        reader.close()


@pytest.mark.parametrize("kind", ["eintr", "short", "delay"])
def test_harmless_faults_change_nothing(build, slab, contents, kind):
    faults = [Fault(at=at, kind=kind, seconds=0.01) for at in range(1, 8)]
    reader = build(FaultyStorage(FakeStorage(contents), faults))
    reader.read_extent(whole(A, contents), slab.view(0, 10 * PAGE)).wait()
    assert bytes(slab.view(0, len(contents[A]))) == contents[A]


def test_a_flipped_bit_arrives_flipped(build, slab, contents):
    reader = build(FaultyStorage(FakeStorage(contents), [Fault(at=1, kind="flip")]), workers=1)
    reader.read_extent(whole(B, contents), slab.view(0, 3 * PAGE)).wait()
    assert slab.view(0, 1)[0] == contents[B][0] ^ 0xFF


def test_a_programming_error_in_a_worker_reaches_the_waiter(build, slab, contents):
    def broken(*_):
        raise ZeroDivisionError

    reader = build(FakeStorage(contents), on_read=broken)
    for _ in range(WORKERS + 1):
        with pytest.raises(ZeroDivisionError):
            reader.read_extent(whole(B, contents), slab.view(0, 3 * PAGE)).wait()


class HeldStorage(FakeStorage):
    """Its first `held` reads wait until all of them have begun and `go` is set."""

    def __init__(self, contents, held):
        super().__init__(contents)
        self.begun = threading.Barrier(held + 1)
        self.go = threading.Event()
        self.reads = 0
        self._held = held
        self._lock = threading.Lock()

    def open(self, path):
        file = super().open(path)
        read_into = file.read_into

        def held(destination, offset):
            with self._lock:
                self.reads += 1
                waits = self.reads <= self._held
            if waits:
                self.begun.wait()
                self.go.wait()
            return read_into(destination, offset)

        file.read_into = held
        return file


def test_cancel_ends_the_wait_and_not_the_reads_that_have_begun(build, slab, contents):
    storage = HeldStorage(contents, WORKERS)
    reader, token = build(storage), CancelToken()
    handle = reader.read_extent(whole(A, contents), slab.view(0, 10 * PAGE))
    storage.begun.wait()
    threading.Timer(0.05, token.cancel).start()
    with pytest.raises(Cancelled):
        handle.wait(token)  # the reads cannot end: only the token ends this
    assert not handle.done() and reader.cancel_pending() == 3
    storage.go.set()
    reader.drain()
    assert handle.done() and isinstance(handle.error, Cancelled)
    assert storage.reads == WORKERS
    reader.read_extent(whole(B, contents), slab.view(0, 3 * PAGE)).wait()
    assert bytes(slab.view(0, 3 * PAGE)) == contents[B]


def test_drain_names_what_hangs(build, slab, contents):
    reader = build(FaultyStorage(FakeStorage(contents), [Fault(at=1, kind="delay", seconds=0.3)]))
    reader.read_extent(whole(B, contents), slab.view(0, 3 * PAGE))
    with pytest.raises(StorageError, match=r"in flight and none ended for 0\.1 s"):
        reader.drain(timeout_s=0.1)


def test_close_ends_what_is_queued(build, slab, contents):
    storage = FaultyStorage(FakeStorage(contents), [Fault(at=1, kind="delay", seconds=0.1)])
    reader = build(storage, workers=1)
    handle = reader.read_extent(whole(A, contents), slab.view(0, 10 * PAGE))
    while storage.reads == 0:
        time.sleep(0.001)
    reader.close()
    assert handle.done()
    with pytest.raises(Cancelled):
        handle.wait()
    with pytest.raises(ClosedError):
        reader.read_extent(whole(B, contents), slab.view(0, 3 * PAGE))


def test_reads_start_in_order_and_are_reported(build, slab, contents):
    seen = []
    reader = build(FakeStorage(contents), workers=1, on_read=lambda *event: seen.append(event))
    handles = [reader.read_extent(whole(path, contents), slab.view(0, 10 * PAGE)) for path in (A, B)]
    for handle in handles:
        handle.wait()
    assert [event[2:] for event in seen] == [
        *((2 * PAGE, A, 2 * PAGE * n) for n in range(5)),
        (2 * PAGE, B, 0),
        (PAGE, B, 2 * PAGE),
    ]
    moments = [moment for event in seen for moment in event[:2]]
    assert moments == sorted(moments)


@pytest.fixture
def clock(monkeypatch):
    clock = VirtualClock()
    monkeypatch.setattr("offload.tiers.requests.perf_counter", clock.now)
    return clock


def test_workers_read_at_the_same_time_and_busy_time_counts_once(build, slab, contents, clock):
    storage = HeldStorage(contents, WORKERS)
    reader = build(storage)
    handle = reader.read_extent(whole(B, contents), slab.view(0, 3 * PAGE))
    storage.begun.wait()
    clock.sleep_until(2.0)
    storage.go.set()
    handle.wait()
    reader.drain()
    assert reader.statistics().busy_s == 2.0


def test_a_link_of_known_speed_is_measured_at_that_speed(build, slab, contents, clock):
    reader = build(ThrottledStorage(FakeStorage(contents), 5 * PAGE, 0.0, clock))
    for _ in range(4):
        reader.read_extent(whole(B, contents), slab.view(0, 3 * PAGE)).wait()
        reader.drain()
        clock.sleep_until(clock.now() + 1)  # idle time is not the link's
    assert reader.statistics().bandwidth_bps == pytest.approx(5 * PAGE)


def test_a_file_that_cannot_be_opened_closes_the_others(tmp_path, contents):
    good = tmp_path / "good"
    good.write_bytes(b"x")
    closed = []

    class Counting(LocalStorage):
        def open(self, path):
            file = super().open(path)
            closed.append(file)
            return file

    with pytest.raises(StorageError, match="missing"):
        NvmeReader(Counting(), [good, tmp_path / "missing"], 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        closed[0].read_into(memoryview(bytearray(1)), 0)


def test_idle_workers_keep_no_destination(build, contents):
    import gc
    import weakref

    class Buffer(bytearray):
        pass

    reader = build(FakeStorage(contents))
    buffer = Buffer(3 * PAGE)
    alive = weakref.ref(buffer)
    reader.read_extent(whole(B, contents), memoryview(buffer)).wait()
    reader.drain()
    del buffer
    time.sleep(0.05)
    gc.collect()
    assert alive() is None


def test_two_threads_share_a_reader(build, slab, contents):
    reader = build(FakeStorage(contents))
    errors = []

    def work(base):
        for n in range(100):
            extent = replace(whole(B, contents), offset=n * 31, nbytes=PAGE)
            view = slab.view(base, extent.window_nbytes)
            reader.read_extent(extent, view).wait()
            if bytes(view[extent.lead : extent.lead + PAGE]) != contents[B][n * 31 : n * 31 + PAGE]:
                errors.append(n)

    threads = [threading.Thread(target=work, args=(base,)) for base in (0, 16 * PAGE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
