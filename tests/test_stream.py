from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.blocks import BlockKey, BlockSpec, Extent
from offload.errors import Cancelled, StorageError
from offload.prefetch.sequential import ring_capacity
from offload.stream import BlockStream
from offload.tiers.base import CancelToken, TransferHandle
from offload.tiers.memory import FakeStorage
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import Slab
from offload.tiers.wrapper import Fault, FaultyStorage

FILE = Path("/model")
CONTENT = bytes(range(256)) * 4096  # 1 MiB in which every window differs


def blocks_of(sizes: list[int]) -> list[BlockSpec]:
    made, offset = [], 77
    for number, nbytes in enumerate(sizes):
        extent = Extent(path=FILE, offset=offset, nbytes=nbytes)
        made.append(BlockSpec(key=BlockKey("weight", number, f"b{number}"), nbytes=nbytes, extent=extent))
        offset += nbytes
    return made


@pytest.fixture
def reader() -> Iterator[NvmeReader]:
    made = NvmeReader(FakeStorage({FILE: CONTENT}), [FILE], workers=2)
    yield made
    made.close()


def bytes_at(slab: Slab, address: int, nbytes: int) -> bytes:
    return bytes(slab.view(address - slab.address, nbytes))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=12), st.floats(0, 2))
def test_every_block_arrives_whole_and_in_order_pass_after_pass(sizes: list[int], slack: float) -> None:
    reader = NvmeReader(FakeStorage({FILE: CONTENT}), [FILE], workers=2)
    blocks = blocks_of(sizes)
    slab = Slab(ring_capacity([[block.footprint] for block in blocks], slack), huge_pages=False)
    stream = BlockStream(blocks, slab, reader)
    try:
        for _ in range(3):
            for block in blocks:
                arrival = stream.acquire(block.key, None)
                assert block.extent is not None
                expected = CONTENT[block.extent.offset : block.extent.end]
                assert bytes_at(slab, arrival.address, block.nbytes) == expected
                stream.release(1)
    finally:
        stream.close()
        reader.close()
        slab.close()


def test_reading_goes_on_into_the_next_pass(reader: NvmeReader) -> None:
    blocks = blocks_of([8000, 8000])
    slab = Slab(64 * 1024, huge_pages=False)
    stream = BlockStream(blocks, slab, reader)
    for block in blocks:
        stream.acquire(block.key, None)
        stream.release(1)
    wait_for(stream.is_ready)
    assert stream.acquire(blocks[0].key, None).was_ready
    stream.close()
    slab.close()


def test_a_cancelled_wait_ends_and_the_stream_begins_anew(reader: NvmeReader) -> None:
    blocks = blocks_of([8000, 9000, 10000])
    slab = Slab(64 * 1024, huge_pages=False)
    stream = BlockStream(blocks, slab, reader)
    stream.acquire(blocks[0].key, None)
    cancel = CancelToken()
    cancel.cancel()
    wait_for(stream.is_ready)
    stall(stream)
    with pytest.raises(Cancelled):
        stream.acquire(blocks[1].key, cancel)
    stream.restart()
    arrival = stream.acquire(blocks[0].key, None)
    assert bytes_at(slab, arrival.address, 8000) == CONTENT[77 : 77 + 8000]
    stream.close()
    slab.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """Reads are started by another thread."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


def test_a_read_that_cannot_be_started_is_raised_where_its_block_is_asked_for(
    reader: NvmeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of([8000, 9000])
    slab = Slab(ring_capacity([[blocks[1].footprint]], 0), huge_pages=False)
    stream = BlockStream(blocks, slab, reader)
    stream.acquire(blocks[0].key, None)
    started = reader.read_extent

    def refuse(*_: object) -> TransferHandle:
        raise StorageError("/model: the file ends before block b0 does")

    monkeypatch.setattr(reader, "read_extent", refuse)
    stream.acquire(blocks[1].key, None)
    stream.release(2)
    wait_for(lambda: stream._failure is not None)
    with pytest.raises(StorageError, match="ends before"):
        stream.acquire(blocks[0].key, None)
    monkeypatch.setattr(reader, "read_extent", started)
    stream.restart()
    assert bytes_at(slab, stream.acquire(blocks[0].key, None).address, 8000) == CONTENT[77 : 77 + 8000]
    stream.close()
    stream.close()
    slab.close()


def test_nothing_is_read_after_the_end(reader: NvmeReader) -> None:
    slab = Slab(64 * 1024, huge_pages=False)
    stream = BlockStream(blocks_of([8000]), slab, reader)
    stream.close()
    stream.fill()
    assert not stream._filler.is_alive() and reader.statistics().bytes == 0
    slab.close()


def stall(stream: BlockStream) -> None:
    """The next handle never ends, so that only the cancel token can end the wait."""
    stream._ahead[0] = stream._ahead[0]._replace(handle=TransferHandle(pieces=1, nbytes=1))


def test_a_failed_read_is_raised_where_its_block_is_asked_for() -> None:
    storage = FaultyStorage(FakeStorage({FILE: CONTENT}), [Fault(at=2, kind="eio")])
    reader = NvmeReader(storage, [FILE], workers=1)
    blocks = blocks_of([8000, 8000])
    slab = Slab(64 * 1024, huge_pages=False)
    stream = BlockStream(blocks, slab, reader)
    stream.acquire(blocks[0].key, None)
    with pytest.raises(StorageError):
        stream.acquire(blocks[1].key, None)
    stream.restart()
    assert stream.acquire(blocks[0].key, None).address
    stream.close()
    reader.close()
    slab.close()


def test_a_cycle_can_be_narrowed_and_widened_again(reader: NvmeReader) -> None:
    blocks = blocks_of([8000, 9000, 10000])
    slab = Slab(64 * 1024, huge_pages=False)
    stream = BlockStream(blocks, slab, reader)
    stream.acquire(blocks[0].key, None)
    for keep in ([1], [0, 2], [], [0, 1, 2]):
        stream.replace({blocks[i].key for i in keep})
        for i in [*keep, *keep]:
            address = stream.acquire(blocks[i].key, None).address
            extent = blocks[i].extent
            assert extent is not None
            assert bytes_at(slab, address, blocks[i].nbytes) == CONTENT[extent.offset : extent.end]
            stream.release(1)
        stream.fill()
    stream.close()
    slab.close()
