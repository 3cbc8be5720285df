"""The order in which reads start, and who may drop them."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.errors import Cancelled, ClosedError, StorageError
from offload.tiers.base import TransferHandle
from offload.tiers.memory import FakeStorage
from offload.tiers.requests import BACKGROUND_READS, Piece, RequestQueue, Taken
from offload.tiers.wrapper import VirtualClock
from offload.units import PAGE

FILE = Path("file")


class Bench:
    """A queue, and pieces that are known by their offsets."""

    def __init__(self) -> None:
        self.queue = RequestQueue()
        self.file = FakeStorage({FILE: bytes(PAGE)}).open(FILE)
        self.handles: dict[int, TransferHandle] = {}
        self.flying: dict[int, Taken] = {}

    def put(self, *offsets: int, background: bool = False) -> None:
        for offset in offsets:
            self.handles[offset] = TransferHandle(pieces=1, nbytes=8)
        pieces = [Piece(self.file, offset, memoryview(bytearray(8)), 8, self.handles[offset]) for offset in offsets]
        self.queue.put(pieces, background=background)

    def start(self, most: int = 99) -> list[int]:
        taken = self.queue.take_ready(most)
        self.flying.update({one.piece.offset: one for one in taken})
        return [one.piece.offset for one in taken]

    def end(self, offset: int, error: Exception | None = None) -> None:
        self.queue.end(self.flying.pop(offset), error)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_demands_start_in_order_and_before_anything_in_the_background(bench: Bench) -> None:
    bench.put(1, 2, background=True)
    bench.put(3, 4)
    assert bench.start(1) == [3]
    assert bench.start(1) == [4]


def test_the_background_only_fills_up_what_a_few_reads_leave(bench: Bench) -> None:
    bench.put(*range(100, 120), background=True)
    bench.put(*range(BACKGROUND_READS))
    assert bench.start() == list(range(BACKGROUND_READS))
    assert bench.start() == []
    bench.end(0)
    assert bench.start() == [100]
    for offset in range(1, BACKGROUND_READS):
        bench.end(offset)
    assert len(bench.start()) == BACKGROUND_READS - 1
    bench.put(7)
    assert bench.start() == [7], "a demand never waits for a place"


def test_a_promoted_read_is_next(bench: Bench) -> None:
    bench.put(1, 2, 3, background=True)
    bench.put(4)
    assert bench.queue.promote([bench.handles[3], bench.handles[2]])
    assert not bench.queue.promote([bench.handles[3]])
    assert bench.start(3) == [2, 3, 4]


def test_what_is_dropped_never_starts_and_says_so(bench: Bench) -> None:
    bench.put(1, 2, background=True)
    bench.put(3)
    bench.queue.drop([bench.handles[2], bench.handles[3]])
    assert bench.start() == [3, 1], "demands cannot be dropped one by one"
    with pytest.raises(Cancelled, match="before it started"):
        bench.handles[2].wait()
    assert not bench.handles[1].done()


def test_pending_reads_of_both_kinds_are_cancelled(bench: Bench) -> None:
    bench.put(1, background=True)
    bench.put(2, 3)
    bench.start(1)
    assert bench.queue.cancel_pending() == 2
    assert bench.start() == [] and not bench.handles[2].done()
    bench.end(2)
    bench.queue.drain(0.1)


def test_drain_waits_for_the_background_too(bench: Bench) -> None:
    bench.put(1, background=True)
    with pytest.raises(StorageError, match=r"none ended for 0\.01 s"):
        bench.queue.drain(0.01)


def test_a_handle_ends_with_what_went_wrong(bench: Bench) -> None:
    bench.put(1, 2)
    bench.start()
    bench.end(1, StorageError("bad sector"))
    bench.end(2)
    with pytest.raises(StorageError, match="bad sector"):
        bench.handles[1].wait()
    bench.handles[2].wait()
    assert bench.queue.statistics().bytes == 8


def test_busy_time_is_that_with_anything_in_flight(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = VirtualClock()
    monkeypatch.setattr("offload.tiers.requests.perf_counter", clock.now)
    bench.put(1, 2)
    bench.start(1)
    clock.sleep_until(1.0)
    bench.start(1)
    clock.sleep_until(3.0)
    bench.end(1)
    assert bench.queue.statistics().busy_s == 3.0
    bench.end(2)
    clock.sleep_until(9.0)
    assert bench.queue.statistics().busy_s == 3.0


def test_a_closed_queue_takes_nothing_and_ends_who_waits(bench: Bench) -> None:
    bench.put(1)
    bench.queue.close()
    bench.queue.close()
    assert bench.queue.take() is None and bench.handles[1].done()
    with pytest.raises(ClosedError):
        bench.put(2)
