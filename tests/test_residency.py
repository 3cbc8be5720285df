"""The table of what is where: parts that lie together as in the file, blocks that come and go, and what counts as a hit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.blocks import BlockKey, BlockSpec, Extent
from offload.errors import Cancelled
from offload.residency import Residency
from offload.stream import BlockStream
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken, TransferHandle
from offload.tiers.memory import FakeStorage, MemoryReader
from offload.tiers.ram import Slab

FILE = Path("/model")
CONTENT = bytes(range(251)) * 800
START = 33


def part(name: str, number: int, offset: int, nbytes: int) -> BlockSpec:
    extent = Extent(path=FILE, offset=START + offset, nbytes=nbytes)
    return BlockSpec(key=BlockKey("weight", 0, name, number), nbytes=nbytes, extent=extent)


A = [part("a", number, number * 5000, 5000) for number in range(4)]
B = [part("b", 0, 20_000, 7000), part("b", 1, 60_000, 7000)]  # a gap between them


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab(128 * 1024, huge_pages=False)
    yield made
    made.close()


@pytest.fixture
def placed() -> dict[BlockKey, int]:
    return {}


@pytest.fixture
def table(placed: dict[BlockKey, int]) -> Residency:
    return Residency(placed.__setitem__, None, Telemetry())


def holds(slab: Slab, address: int, block: BlockSpec) -> bool:
    assert block.extent is not None
    return bytes(slab.view(address - slab.address, block.nbytes)) == CONTENT[block.extent.offset : block.extent.end]


def test_parts_of_a_matrix_lie_as_in_the_file_and_others_where_they_fit(
    table: Residency, placed: dict[BlockKey, int], slab: Slab
) -> None:
    reader = MemoryReader(FakeStorage({FILE: CONTENT}), [FILE])
    table.pin([*A, *B], slab, reader)
    assert all(holds(slab, placed[block.key], block) for block in [*A, *B])
    assert [placed[block.key] - placed[A[0].key] for block in A] == [0, 5000, 10_000, 15_000]
    assert placed[B[1].key] - placed[B[0].key] < 40_000
    assert max(placed[block.key] + block.nbytes for block in B) <= slab.address + sum(b.footprint for b in [*A, *B])
    assert reader.statistics().bytes < sum(block.footprint for block in [*A, *B])


def test_a_second_share_goes_behind_the_first(table: Residency, placed: dict[BlockKey, int], slab: Slab) -> None:
    reader, seen = MemoryReader(FakeStorage({FILE: CONTENT}), [FILE]), []
    table.pin(A[:2], slab, reader, lambda done, total: seen.append((done, total)))
    end = sum(block.footprint for block in A[:2])
    table.pin(A[2:], slab, reader, lambda done, total: seen.append((done, total)), offset=end)
    assert seen == [(end, end), (sum(block.footprint for block in A[2:]),) * 2]
    assert all(holds(slab, placed[block.key], block) for block in A)
    assert placed[A[2].key] >= slab.address + end
    table.unpin(A[:2])
    assert (table.pinned.get(A[0].key), table.pinned.get(A[3].key)) == (None, placed[A[3].key])


def test_a_pin_can_be_cancelled(table: Residency, slab: Slab) -> None:
    class Stalled(MemoryReader):
        def read_extent(self, extent: Extent, destination: memoryview) -> TransferHandle:
            return TransferHandle(pieces=1, nbytes=extent.nbytes)

    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        table.pin(A, slab, Stalled(FakeStorage({FILE: CONTENT}), [FILE]), cancel=cancel)


def test_pinned_and_waiting_blocks_are_hits_and_late_ones_are_not(placed: dict[BlockKey, int], slab: Slab) -> None:
    telemetry, reader = Telemetry(), MemoryReader(FakeStorage({FILE: CONTENT}), [FILE])
    stream = BlockStream(A, slab, reader)
    table = Residency(placed.__setitem__, stream, telemetry)
    table.acquire(3, [A[0].key], None)
    assert holds(slab, placed[A[0].key], A[0])
    assert (telemetry.demands, telemetry.hits) == (4, 4)
    while not stream._ahead:
        stream.fill()
    stream._ahead[0] = stream._ahead[0]._replace(handle=LateHandle(pieces=1, nbytes=1))
    table.release([A[0].key])
    table.acquire(0, [A[1].key], None)
    assert (telemetry.demands, telemetry.hits) == (5, 4)
    table.stream({A[3].key})
    table.acquire(0, [A[3].key], None)
    assert holds(slab, placed[A[3].key], A[3])
    table.release([A[3].key])
    table.read_ahead()
    table.restart()
    stream.close()


class LateHandle(TransferHandle):
    """Ends when it is waited for."""

    def wait(self, cancel: CancelToken | None = None, timeout_s: float = 60.0) -> None:
        self.complete(1)
