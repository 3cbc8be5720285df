"""Token rows: from disk what they are in memory, one read for each distinct token, and nothing in flight after a failure."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.blocks import Extent
from offload.elements import BY_NAME
from offload.embedding import EmbeddingTable
from offload.errors import Cancelled, StorageError, UsageError
from offload.kernels.ggml.dequantize import dequantize
from offload.models.checkpoint.base import TensorInfo
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken
from offload.tiers.memory import FakeStorage, MemoryReader
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import CAN_DISCARD
from offload.tiers.wrapper import Fault, FaultyStorage
from offload.units import PAGE

FILE, START, VOCAB, HIDDEN = Path("/model"), 3333, 40, 1280
TYPES = ("F32", "F16", "Q4_0", "Q6_K")


def table_of(element: str) -> TensorInfo:
    kind = BY_NAME[element]
    extent = Extent(path=FILE, offset=START, nbytes=VOCAB * kind.row_bytes(HIDDEN))
    return TensorInfo(name="token_embd.weight", element=kind, shape=(VOCAB, HIDDEN), extent=extent)


CONTENT = bytes(START) + np.random.default_rng(0).integers(0, 120, VOCAB * 4 * HIDDEN, np.uint8).tobytes()  # no NaN
STORAGE = FakeStorage({FILE: CONTENT})
TABLE = table_of("F16")


def values_of(table: TensorInfo, scale: float) -> np.ndarray:
    """The plain reference: all of the table, converted at once."""
    raw = np.frombuffer(CONTENT, np.uint8, table.nbytes, START)
    return dequantize(raw, table.element, VOCAB * HIDDEN).reshape(VOCAB, HIDDEN) * np.float32(scale)


@settings(deadline=None)
@given(
    st.sampled_from(TYPES), st.sampled_from([1.0, 2.5]), st.integers(1, 4),
    st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=12), min_size=1, max_size=3),
)  # fmt: skip
def test_rows_from_disk_are_rows_from_memory(element: str, scale: float, scratch: int, asked: list[list[int]]) -> None:
    table, reader = table_of(element), MemoryReader(STORAGE, [FILE])
    on_disk = EmbeddingTable(table, scale, reader, scratch, Telemetry())
    resident = EmbeddingTable(table, scale, reader, 1, Telemetry())
    resident.place(memoryview(CONTENT)[START : START + table.nbytes])
    expected, size = values_of(table, scale), table.row_nbytes
    for tokens in asked:
        before = reader.statistics().bytes
        assert np.array_equal(resident.rows(tokens), expected[tokens])
        assert reader.statistics().bytes == before, "a table in memory reads nothing"
        assert np.array_equal(on_disk.rows(tokens), expected[tokens])
        windows = (Extent(path=FILE, offset=START + row * size, nbytes=size).window_nbytes for row in set(tokens))
        assert reader.statistics().bytes - before == sum(windows), "one read for each distinct token"
    on_disk.close()
    resident.close()


@given(
    st.lists(st.integers(-3, VOCAB + 3), max_size=6), st.sampled_from([-(2**40), -1, VOCAB, 2**40]), st.integers(0, 6)
)
def test_ids_outside_of_the_vocabulary_are_named_and_nothing_is_read(others: list[int], wrong: int, at: int) -> None:
    tokens = [*others[:at], wrong, *others[at:]]
    reader = MemoryReader(STORAGE, [FILE])
    table = EmbeddingTable(TABLE, 1.0, reader, 2, Telemetry())
    with pytest.raises(UsageError, match=rf"0 \.\. {VOCAB - 1}; got {min(tokens)} \.\. {max(tokens)}"):
        table.rows(tokens)
    assert reader.statistics().bytes == 0
    table.close()


@pytest.mark.parametrize("at", [1, 4, 7])
@pytest.mark.parametrize("cancelled", [False, True])
def test_after_a_failed_read_or_a_cancel_in_the_middle_nothing_is_in_flight_and_the_next_rows_are_right(
    at: int, cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker for a read that fails or takes long, behind which others queue up."""
    storage, cancel, tokens = (
        FaultyStorage(STORAGE, [] if cancelled else [Fault(at=at, kind="eio")]),
        CancelToken(),
        [5, 1, 9, 30, 2, 7, 8],
    )
    reader, table_values, go = NvmeReader(storage, [FILE], workers=1), values_of(TABLE, 1.0), threading.Event()
    table, next_fault, drain = EmbeddingTable(TABLE, 1.0, reader, 4, Telemetry()), storage.next_fault, reader.drain

    def stall() -> Fault | None:
        if storage.reads + 1 == at:
            cancel.cancel()
            assert go.wait(20)
        return next_fault()

    if cancelled:
        monkeypatch.setattr(storage, "next_fault", stall)
    monkeypatch.setattr(reader, "drain", lambda: go.set() or drain())
    with pytest.raises(Cancelled if cancelled else StorageError):
        table.rows(tokens, cancel)
    assert not cancelled or storage.reads == at, "reads behind the one that was waited for are dropped"
    assert go.is_set() and reader._queue.is_idle
    assert np.array_equal(table.rows(tokens, CancelToken()), table_values[tokens])
    reader.close()
    table.close()


@pytest.mark.skipif(not CAN_DISCARD, reason="this system does not give memory back")
def test_scratch_memory_is_given_back_and_taken_anew() -> None:
    table = EmbeddingTable(TABLE, 1.0, MemoryReader(STORAGE, [FILE]), 3, Telemetry())
    assert table._scratch.nbytes == EmbeddingTable.scratch_nbytes(TABLE, 3)
    table.rows([4, 5, 6])
    scratch = table._scratch.view(0, table._scratch.nbytes)
    assert any(scratch[::PAGE])
    table.release_scratch()
    assert not any(scratch), "pages that were given back read as zeros"
    assert np.array_equal(table.rows([7]), values_of(TABLE, 1.0)[[7]])
    table.close()
    table.close()
    assert table._scratch._region is None
