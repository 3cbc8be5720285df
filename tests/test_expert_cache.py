"""Experts that come and go: whatever is asked for is computed once, from its own bytes, however few slots there are."""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.blocks import ExpertKey, Extent
from offload.elements import BY_NAME
from offload.errors import Cancelled, StorageError
from offload.expert_bank import BankSpec, expert_banks
from offload.expert_cache import ExpertCache
from offload.expert_slots import ExpertBank
from offload.models.base import ExpertLayer, ExpertMatrices
from offload.models.checkpoint.base import TensorInfo
from offload.prefetch.eviction import LeastRecentlyUsed
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken, TransferHandle
from offload.tiers.memory import FakeStorage, MemoryReader
from offload.tiers.ram import Slab

FILE = Path("/experts")
LAYERS, EXPERTS, USED = 3, 12, 2
SHAPES = {"gate": (33, 64), "up": (33, 64), "down": (64, 33)}  # 8,448 bytes each: no multiple of a page
CONTENT = np.random.default_rng(0).bytes(3 * LAYERS * EXPERTS * 33 * 64 * 4 + 777)


def make_layers() -> list[ExpertLayer]:
    """All gates of a layer, then all ups, then all downs, as a GGUF has them, from an odd offset on."""
    offset, layers = 777, []
    for layer in range(LAYERS):
        roles = []
        for role, shape in SHAPES.items():
            nbytes = shape[0] * shape[1] * 4
            members = []
            for expert in range(EXPERTS):
                extent = Extent(path=FILE, offset=offset, nbytes=nbytes)
                members.append(
                    TensorInfo(name=f"{layer}.{role}.{expert}", element=BY_NAME["F32"], shape=shape, extent=extent)
                )
                offset += nbytes
            roles.append(members)
        experts = tuple(ExpertMatrices(*three) for three in zip(*roles, strict=True))
        layers.append(ExpertLayer(layer=layer, num_used=USED, activation="silu", experts=experts))
    return layers


class Kernels:
    """A backend that checks, and notes in order, what it is asked to compute."""

    def __init__(self, spec: BankSpec, slab: Slab) -> None:
        self.spec, self.slab = spec, slab
        self.computed: list[tuple[int, ExpertKey]] = []

    def compute_experts(self, batch: int, layer: int, slots: Mapping[int, int]) -> float:
        experts = next(one for one in self.spec.layers if one.layer == layer)
        for expert, slot in slots.items():
            for matrix, offset in zip(experts.experts[expert], self.spec.offsets(experts), strict=True):
                start = self.slab.address + slot * self.spec.stride + offset
                assert ctypes.string_at(start, matrix.nbytes) == CONTENT[matrix.extent.offset : matrix.extent.end]
            self.computed.append((batch, ExpertKey(layer, expert)))
        return 0.0


class HeldReader:
    """Reads when told to, in the order of the requests."""

    def __init__(self) -> None:
        self.inner = MemoryReader(FakeStorage({FILE: CONTENT}), [FILE])
        self.requests: deque[tuple[Extent, memoryview, TransferHandle]] = deque()
        self.fails = self.refuses = False
        self.submissions = 0

    def read_extent(self, extent: Extent, destination: memoryview) -> TransferHandle:
        handle = TransferHandle(pieces=1, nbytes=extent.window_nbytes)
        self.requests.append((extent, destination, handle))
        return handle

    def read_extents(
        self, requests: Sequence[tuple[Extent, memoryview]], *, background: bool = False
    ) -> list[TransferHandle]:
        self.submissions += 1
        if self.refuses:
            raise StorageError("the file has shrunk")
        return [self.read_extent(extent, destination) for extent, destination in requests]

    def release(self, count: int) -> None:
        for _ in range(count):
            extent, destination, handle = self.requests.popleft()
            if self.fails:
                handle.fail(StorageError("the disk failed"))
            else:
                self.inner.read_extent(extent, destination)
                handle.complete(extent.window_nbytes)

    def cancel_pending(self) -> int:
        for _, _, handle in self.requests:
            handle.fail(Cancelled("dropped"))
        self.requests.clear()
        return 0

    def drain(self) -> None:
        assert not self.requests


class Bench:
    """A cache over a bank of so many slots."""

    def __init__(self, num_slots: int, reader: object | None = None) -> None:
        layers = make_layers()
        model = type("Model", (), {"experts": {layer.layer: layer for layer in layers}})
        (self.spec,) = expert_banks(model)  # type: ignore[arg-type]
        self.slab = Slab(num_slots * self.spec.stride, huge_pages=False)
        self.kernels = Kernels(self.spec, self.slab)
        self.reader = reader or MemoryReader(FakeStorage({FILE: CONTENT}), [FILE])
        self.bank = ExpertBank(self.spec, self.slab, num_slots, self.reader, LeastRecentlyUsed(range(LAYERS), EXPERTS))  # type: ignore[arg-type]
        self.telemetry = Telemetry()
        banks = dict.fromkeys(range(LAYERS), self.bank)
        self.cache = ExpertCache(banks, self.kernels, self.reader, self.telemetry)  # type: ignore[arg-type]

    def run(self, layer: int, *choices: Sequence[Sequence[int]]) -> None:
        """One layer of a pass whose micro-batches made these choices, and what was computed for it."""
        self.kernels.computed = []
        self.cache.demand(layer, [np.array(choice, np.int32).reshape(len(choice), -1) for choice in choices])
        self.cache.compute(layer, None)
        wanted = {(batch, ExpertKey(layer, e)) for batch, choice in enumerate(choices) for row in choice for e in row}
        assert Counter(self.kernels.computed) == Counter(wanted)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(6)
    yield made
    made.slab.close()


def test_a_slot_has_room_for_every_expert_and_layers_agree_on_where_it_lies() -> None:
    bench = Bench(1)
    for layer in bench.spec.layers:
        offsets = bench.spec.offsets(layer)
        for matrices in layer.experts:
            for matrix, start, window, offset in zip(
                matrices, bench.spec.starts, bench.spec.windows, offsets, strict=True
            ):
                assert matrix.extent.window_nbytes <= window
                assert start <= offset and offset + matrix.nbytes <= start + window
    bench.slab.close()


choices = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=USED, max_size=USED, unique=True), min_size=1, max_size=9
)
passes = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.lists(choices, min_size=1, max_size=3)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(num_slots=st.integers(1, LAYERS * EXPERTS), work=passes)
def test_whatever_is_chosen_is_computed_once_from_its_own_bytes(num_slots: int, work: list) -> None:
    bench = Bench(max(USED, num_slots))
    for layer, batches in work:
        before = bench.reader.statistics().bytes
        missing = {
            e for choice in batches for row in choice for e in row if bench.bank.slot(ExpertKey(layer, e)) is None
        }
        bench.run(layer, *batches)
        experts = bench.spec.layers[layer].experts
        read = sum(matrix.extent.window_nbytes for e in missing for matrix in experts[e])
        assert bench.reader.statistics().bytes - before == read, "each expert is read once, and only if it was missing"
    bench.slab.close()


def test_what_is_there_is_computed_while_the_rest_is_on_its_way() -> None:
    reader = HeldReader()
    bench = Bench(6, reader)
    bench.cache.demand(0, [np.array([[1, 2]], np.int32)])
    assert (len(reader.requests), reader.submissions) == (6, 1), "all that is missing is asked for at once"
    reader.release(6)
    bench.cache.compute(0, None)
    bench.kernels.computed = []
    bench.cache.demand(0, [np.array([[2, 5]], np.int32)])
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        bench.cache.compute(0, token)
    assert bench.kernels.computed == [(0, ExpertKey(0, 2))]
    bench.cache.restart()
    assert bench.bank.slot(ExpertKey(0, 5)) is None
    bench.slab.close()


def test_a_failed_read_costs_no_slot() -> None:
    reader = HeldReader()
    bench = Bench(2, reader)
    for fails in (True, False):
        reader.fails = fails
        bench.cache.demand(1, [np.array([[3, 4]], np.int32)])
        reader.release(6)
        if fails:
            with pytest.raises(StorageError, match="the disk failed"):
                bench.cache.compute(1, None)
            bench.cache.restart()
    bench.cache.compute(1, None)
    assert {key for _, key in bench.kernels.computed} == {ExpertKey(1, 3), ExpertKey(1, 4)}
    bench.slab.close()


def test_a_refused_read_costs_no_slot() -> None:
    reader = HeldReader()
    bench = Bench(2, reader)
    choice = [np.array([[3, 4]], np.int32)]
    reader.refuses = True
    with pytest.raises(StorageError, match="has shrunk"):
        bench.cache.demand(1, choice)
    bench.cache.restart()
    reader.refuses = False
    bench.cache.demand(1, choice)
    reader.release(6)
    bench.cache.compute(1, None)
    assert len(bench.kernels.computed) == 2
    bench.slab.close()


def test_a_prompt_leaves_what_tokens_use() -> None:
    bench = Bench(16)
    kept = [ExpertKey(0, e) for e in range(8)]
    for expert in range(8):
        bench.run(0, [[expert, (expert + 1) % 8]])
    for layer in (1, 2):
        bench.run(layer, [[e, (e + 1) % EXPERTS] for e in range(EXPERTS)])
    assert all(bench.bank.slot(key) is not None for key in kept)
    bench.slab.close()


def test_hits_and_demands_are_counted(bench: Bench) -> None:
    bench.run(0, [[1, 2]])
    bench.run(0, [[2, 3]])
    assert (bench.telemetry.experts_demanded, bench.telemetry.experts_hit) == (4, 1)


def test_experts_are_filled_in_up_to_the_last_slot(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    bench.cache.fill((ExpertKey(2, e) for e in range(EXPERTS)), lambda done, total: seen.append((done, total)))
    assert [bench.bank.slot(ExpertKey(2, e)) is not None for e in range(EXPERTS)] == [True] * 6 + [False] * 6
    assert seen[-1] == (6, 6)
    before = bench.reader.statistics().bytes
    bench.run(2, [[0, 5]])
    assert bench.reader.statistics().bytes == before
