"""Filling the arena of a device: the same bytes by every way, the faster way by a trial, and no buffer used twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.fake_kvikio import FakeKvikio, install

import offload
from offload import arena
from offload.arena import Placed, fill_arena
from offload.blocks import BlockKey, BlockSpec, Extent
from offload.errors import StorageError
from offload.tiers.base import CancelToken, Handle
from offload.tiers.direct import DirectReader, load_kvikio
from offload.tiers.files import LocalStorage
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import Slab
from offload.tiers.wrapper import Fault, FaultyStorage
from offload.units import PAGE, align_up

SIZES = (5, PAGE, 3 * PAGE + 17, 9 * PAGE + 1, 700, 16 * PAGE, 2 * PAGE - 1, 40_000)


class LateCopy:
    """A copy that takes its bytes when it is waited for: a buffer that is overwritten before shows."""

    def __init__(self, source: memoryview, target: torch.Tensor) -> None:
        self.nbytes, self.error, self._source, self._target = len(source), None, source, target
        self._done = False

    def done(self) -> bool:
        return self._done

    def wait(self, cancel: CancelToken | None = None, timeout_s: float = 60.0) -> None:
        if not self._done:
            self._target.copy_(torch.frombuffer(bytearray(self._source), dtype=torch.uint8))
        self._done = True


class LateArena:
    def __init__(self, nbytes: int) -> None:
        self.memory = torch.zeros(nbytes, dtype=torch.uint8)
        self.copies: list[LateCopy] = []

    def copy_in(self, source: memoryview, offset: int) -> Handle:
        self.copies.append(LateCopy(source, self.view(offset, len(source))))
        assert sum(not copy.done() for copy in self.copies) <= 2
        return self.copies[-1]

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        return self.memory[offset : offset + nbytes]


class Case:
    """A file of matrices at odd places, and where they are to lie."""

    def __init__(self, path: Path, storage: Any = None, sizes: Sequence[int] = SIZES) -> None:
        rng = random.Random(3)
        self.placed: list[Placed] = []
        end, top = 0, 0
        for number, nbytes in enumerate(sizes):
            start = end + rng.randrange(5000)
            block = BlockSpec(
                key=BlockKey("weight", 0, str(number)),
                nbytes=nbytes,
                extent=Extent(path=path, offset=start, nbytes=nbytes),
            )
            self.placed.append(Placed(block, top))
            end, top = start + nbytes, align_up(top + nbytes)
        self.data = rng.randbytes(end)
        path.write_bytes(self.data)
        self.reader = NvmeReader(storage or LocalStorage(), [path], 2)
        self.arena = LateArena(top)
        self.registered = 0

    def register(self, slab: Slab) -> Callable[[], None]:
        self.registered += 1

        def undo() -> None:
            assert all(copy.done() for copy in self.arena.copies), "a buffer goes while it is copied"
            self.registered -= 1

        return undo

    def fill(self, direct: DirectReader | None = None) -> None:
        fill_arena(self.placed, self.arena, self.reader, direct, self.register)

    def check(self) -> None:
        for one in self.placed:
            here = bytes(self.arena.view(one.offset, one.block.nbytes).numpy())
            assert here == self.data[one.extent.offset : one.extent.end], one.block.key
        assert self.registered == 0


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    with ExitStack() as stack:
        made = Case(tmp_path / "matrices")
        stack.callback(made.reader.close)
        yield made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    made = FakeKvikio(compat=True)
    install(made, monkeypatch)
    return made


def direct_for(case: Case) -> DirectReader:
    kvikio = load_kvikio("cuda")
    assert kvikio is not None
    return DirectReader(kvikio, case.reader)


@pytest.mark.parametrize("staging", [PAGE, 2 * PAGE, 5 * PAGE, arena.STAGING_BYTES])
def test_through_host_memory_in_pieces_of_any_size(case: Case, monkeypatch: pytest.MonkeyPatch, staging: int) -> None:
    monkeypatch.setattr(arena, "STAGING_BYTES", staging)
    case.fill()
    case.check()
    needed = sum(-(-one.block.footprint // staging) for one in case.placed)
    assert len(case.arena.copies) == needed
    fill_arena([], case.arena, case.reader, None, case.register)


@pytest.mark.parametrize(
    ("compat", "direct_s", "by_kvikio", "through_host"),
    [(True, 1.0, 6, 2), (True, 2.0, 6, 2), (True, 2.1, 3, 5), (False, 9.0, 8, 0)],
)
def test_the_faster_way_is_taken_and_no_trial_where_the_disk_writes_into_the_card(
    tmp_path: Path, fake: FakeKvikio, monkeypatch: pytest.MonkeyPatch, compat: bool, direct_s: float, by_kvikio: int,
    through_host: int,
) -> None:  # fmt: skip
    """Of eight: one opens the file, two are tried by kvikio, two through host memory, which takes 2 seconds."""
    fake.compat = compat
    clock = iter([0.0, direct_s, 0.0, 2.0])
    monkeypatch.setattr(arena, "TRIAL_BYTES", 10)
    monkeypatch.setattr(arena, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    case = Case(tmp_path / "matrices", sizes=(5,) * 8)
    case.fill(direct_for(case))
    case.check()
    case.reader.close()
    assert (len(fake.reads), len(case.arena.copies)) == (by_kvikio, through_host)
    assert fake.closed == fake.opened and fake.freed


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_before_the_choice_falls_back(
    case: Case, fake: FakeKvikio, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    monkeypatch.setattr(arena, "TRIAL_BYTES", PAGE)
    fake.answer = lambda number, nbytes: nbytes - (number >= failing)
    case.fill(direct_for(case))
    case.check()
    assert len(case.arena.copies) == len(SIZES) and fake.closed == fake.opened


def test_a_failure_after_the_choice_is_an_error(case: Case, fake: FakeKvikio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "TRIAL_BYTES", PAGE)
    fake.compat = False
    fake.answer = lambda number, nbytes: nbytes - (number == 6)
    with pytest.raises(StorageError, match="kvikio failed: it ended after"):
        case.fill(direct_for(case))
    assert case.registered == 0 and fake.closed == fake.opened


@pytest.mark.parametrize("number", range(1, 30, 4))
def test_a_read_that_fails_leaves_nothing_in_the_buffers(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "STAGING_BYTES", PAGE)
    case = Case(tmp_path / "matrices", FaultyStorage(LocalStorage(), [Fault(at=number, kind="eio")]))
    with pytest.raises(StorageError, match="stopped after"):
        case.fill()
    assert case.registered == 0
    case.reader.close()


def test_an_engine_reads_what_is_resident_straight_from_disk_and_says_the_same(
    tmp_path: Path, fake: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch:cpu` stands in for a card that kvikio knows; files that others read for us are never read so."""
    model = tiny_checkpoint("llama", tmp_path)
    with ExitStack() as stack:
        file = LocalStorage().open(model / "model.safetensors")
        stack.callback(file.close)
        if not file.direct:
            pytest.skip("the file system has no direct I/O")

    def logits(**options: Any) -> bytes:
        with offload.load(model, device="torch:cpu", vram="64MiB", ctx=64, **options) as engine:
            return bytes(engine.logits([1, 2, 3]))

    expected = logits()
    assert not fake.reads
    monkeypatch.setattr("offload.device_place.load_kvikio", lambda _: load_kvikio("cuda"))
    assert logits() == expected and fake.reads
    fake.reads.clear()
    assert logits(storage=FaultyStorage(LocalStorage(), [])) == expected and not fake.reads
