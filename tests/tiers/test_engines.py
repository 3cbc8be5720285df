"""The engine on the kernel's asynchronous reads, with a kernel that does what a test tells it to."""

from __future__ import annotations

import ctypes
import errno
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from offload.errors import StorageError
from offload.tiers.aio import AioContext, Event, Request
from offload.tiers.base import TransferHandle
from offload.tiers.engines import AioEngine, ThreadEngine, make_engine
from offload.tiers.files import LocalStorage
from offload.tiers.memory import FakeFile, FakeStorage
from offload.tiers.requests import Piece, RequestQueue
from offload.units import PAGE

FILE = Path("file")
CONTENT = bytes(range(256)) * 64


class Numbered(FakeFile):
    """A file that the kernel knows by a number."""

    descriptor = 5


class Kernel:
    """Ends requests when told to, with the results that it is given; takes `room` of them at once."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, Request]] = []
        self.refused: list[OSError] = []
        self.room = 99
        self.ended: queue.Queue[Event] = queue.Queue()
        self.closed = False

    def submit(self, requests: Iterable[tuple[int, Request]]) -> int:
        if self.refused:
            raise self.refused.pop(0)
        accepted = list(requests)[: self.room]
        self.requests += accepted
        return len(accepted)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        try:
            return [self.ended.get(timeout=0.01)]
        except queue.Empty:
            return []

    def end(self, place: int, result: int | None = None) -> None:
        number, request = self.requests[place]
        assert request.fd == 5
        count = request.nbytes if result is None else max(0, result)
        data = CONTENT[request.offset : request.offset + count]
        ctypes.memmove(request.address, data, len(data))
        self.ended.put(Event(number, request.nbytes if result is None else result))

    def close(self) -> None:
        self.closed = True


class Bench:
    def __init__(self, depth: int = 4) -> None:
        self.storage = FakeStorage({FILE: CONTENT})
        self.kernel, self.queue, self.seen = Kernel(), RequestQueue(), []
        self.engine = AioEngine(self.queue, depth, lambda *event: self.seen.append(event), self.kernel)  # type: ignore[arg-type]
        self.file = Numbered(self.storage, FILE)

    def read(self, offset: int, nbytes: int, needed: int | None = None) -> tuple[TransferHandle, bytearray]:
        destination, handle = bytearray(nbytes), TransferHandle(pieces=1, nbytes=nbytes)
        view = memoryview(destination)
        self.queue.put([Piece(self.file, offset, view, needed or nbytes, handle)])
        self.engine.kick()
        return handle, destination


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.queue.close()
    assert made.engine.join(5.0) and made.kernel.closed


def test_reads_end_in_the_order_of_the_disk(bench: Bench) -> None:
    (first, head), (second, tail) = bench.read(0, 100), bench.read(100, 50)
    bench.kernel.end(1)
    second.wait()
    assert not first.done() and bytes(tail) == CONTENT[100:150]
    bench.kernel.end(0)
    first.wait()
    assert bytes(head) == CONTENT[:100]
    assert [event[2:] for event in bench.seen] == [(50, FILE, 100), (100, FILE, 0)]


def test_no_more_than_the_depth_is_in_flight(bench: Bench) -> None:
    handles = [bench.read(n, 1)[0] for n in range(6)]
    assert len(bench.kernel.requests) == 4
    bench.kernel.end(2)
    handles[2].wait()
    for place in (0, 1, 3):
        bench.kernel.end(place)
        handles[place].wait()
    while len(bench.kernel.requests) < 6:
        threading.Event().wait(0.001)
    for place in (4, 5):
        bench.kernel.end(place)
        handles[place].wait()


def test_an_error_of_the_disk_is_named_with_its_place(bench: Bench) -> None:
    handle, _ = bench.read(64, 100)
    bench.kernel.end(0, -errno.EIO)
    with pytest.raises(StorageError, match=r"file: reading 100 bytes at offset 64 stopped after 0: Input/output error"):
        handle.wait()
    after, destination = bench.read(0, 10)
    bench.kernel.end(1)
    after.wait()
    assert bytes(destination) == CONTENT[:10]


def test_a_short_read_is_completed(bench: Bench) -> None:
    handle, destination = bench.read(32, 100)
    bench.kernel.end(0, 40)
    handle.wait()
    assert bytes(destination) == CONTENT[32:132]


def test_a_read_that_may_be_short_is_not_read_again(bench: Bench) -> None:
    handle, _ = bench.read(0, 100, needed=40)
    bench.kernel.end(0, 40)
    handle.wait()
    assert len(bench.kernel.requests) == 1


def test_a_file_that_has_changed_fails_what_was_read_from_it(bench: Bench) -> None:
    handle, _ = bench.read(0, 100)
    bench.storage.write(FILE, CONTENT + b"more")
    bench.kernel.end(0)
    with pytest.raises(StorageError, match="while it was in use"):
        handle.wait()


def test_what_the_kernel_refuses_fails_alone(bench: Bench) -> None:
    bench.kernel.refused = [OSError(errno.EBADF, "Bad file descriptor")]
    refused, _ = bench.read(0, 10)
    with pytest.raises(StorageError, match="Bad file descriptor"):
        refused.wait()
    handle, _ = bench.read(10, 10)
    bench.kernel.end(0)
    handle.wait()


def test_what_the_kernel_takes_in_part_is_offered_again(bench: Bench) -> None:
    bench.kernel.room = 1
    pieces = []
    for n in range(3):
        handle = TransferHandle(pieces=1, nbytes=8)
        pieces.append(Piece(bench.file, 8 * n, memoryview(bytearray(8)), 8, handle))
    bench.queue.put(pieces)
    bench.engine.kick()
    assert [request.offset for _, request in bench.kernel.requests] == [0, 8, 16]
    assert len({number for number, _ in bench.kernel.requests}) == 3
    for place, piece in enumerate(pieces):
        bench.kernel.end(place)
        piece.handle.wait()


def test_threads_serve_files_that_the_kernel_does_not_know() -> None:
    requests = RequestQueue()
    engine = make_engine(requests, [FakeStorage({FILE: CONTENT}).open(FILE)], 2, None)
    assert isinstance(engine, ThreadEngine)
    requests.close()
    assert engine.join(5.0)


def test_threads_serve_where_the_kernel_has_no_such_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(depth: int) -> AioContext:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("offload.tiers.engines.AioContext", refuse)
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    file, requests = LocalStorage().open(path), RequestQueue()
    engine = make_engine(requests, [file], 2, None)
    assert isinstance(engine, ThreadEngine)
    requests.close()
    assert engine.join(5.0)
    file.close()
