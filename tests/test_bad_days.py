"""The disk fails, files change, memory is refused: one clear error, no hang, no wrong token, and what stays usable."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint

import offload
from offload.errors import AllocationError, ClosedError, StorageError
from offload.tiers.files import LocalStorage
from offload.tiers.ram import Slab
from offload.tiers.wrapper import Fault, FaultKind, FaultyStorage
from offload.trace import write_trace

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(model: Path) -> tuple[int, ...]:
    with offload.load(model, ctx=64, ram="minimum") as engine:
        return engine.generate(PROMPT, max_tokens=6, temperature=0, ignore_eos=True).tokens


def storage_with(faults: Sequence[Fault]) -> FaultyStorage:
    return FaultyStorage(LocalStorage(), faults)


@pytest.mark.parametrize("kind", ["eio", "truncated"])
def test_the_nth_read_fails_for_every_n(model: Path, expected: tuple[int, ...], kind: FaultKind) -> None:
    """Every token that came out before the error is right, the error is StorageError, and nothing hangs."""
    failures = 0
    for at in [*range(1, 40, 3), *range(40, 400, 60)]:
        tokens: list[int] = []
        try:
            with offload.load(model, ctx=64, ram="minimum", storage=storage_with([Fault(at=at, kind=kind)])) as engine:
                for chunk in engine.stream(PROMPT, max_tokens=6, temperature=0, ignore_eos=True):
                    tokens += chunk.tokens
        except StorageError as error:
            failures += 1
            assert "\n" not in str(error)
            assert str(model) in str(error)
        assert tokens == list(expected[: len(tokens)])
    assert failures > 5


@pytest.mark.parametrize("kind", ["eintr", "short"])
def test_interrupted_and_short_reads_are_continued(model: Path, expected: tuple[int, ...], kind: FaultKind) -> None:
    faults = [Fault(at=at, kind=kind) for at in range(5, 60, 7)]
    with offload.load(model, ctx=64, ram="minimum", storage=storage_with(faults)) as engine:
        assert engine.generate(PROMPT, max_tokens=6, temperature=0, ignore_eos=True).tokens == expected


def test_after_a_disk_error_the_engine_is_closed_for_requests(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.host_place.CAN_DISCARD", False)  # nothing is lent, so every token reads
    with offload.load(model, ctx=64, ram="minimum", storage=storage_with([Fault(at=120, kind="eio")])) as engine:
        with pytest.raises(StorageError):
            engine.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True)
        with pytest.raises(ClosedError, match="load the model again"):
            engine.generate(PROMPT, max_tokens=1)


@pytest.mark.parametrize("damage", ["truncate", "replace"])
def test_a_file_that_changes_under_the_engine_is_noticed(model: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    with offload.load(copy, ctx=64, ram="minimum") as engine:
        engine.generate(PROMPT, max_tokens=1, temperature=0)
        weights = copy / "model.safetensors"
        if damage == "truncate":
            with weights.open("r+b") as file:
                file.truncate(5000)
        else:
            weights.write_bytes(weights.read_bytes()[::-1])
        with pytest.raises(StorageError, match=r"model\.safetensors"):
            engine.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("nth", [1, 2])
def test_no_memory_for_a_slab_is_one_clear_error(model: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    before = threading.active_count()
    calls = 0

    class Refusing(Slab):
        def __init__(self, nbytes: int, **options: bool) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise AllocationError(f"memory: {nbytes} bytes refused", needed_bytes=nbytes)
            super().__init__(nbytes, **options)

    monkeypatch.setattr("offload.host_place.Slab", Refusing)
    with pytest.raises(AllocationError, match="refused"):
        offload.load(model, ctx=64)
    assert threading.active_count() == before, "a failed load must leave no thread behind"


def test_closing_leaves_no_thread(model: Path) -> None:
    before = threading.active_count()
    with offload.load(model, ctx=64, ram="minimum") as engine:
        engine.generate(PROMPT, max_tokens=1, temperature=0)
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["file/trace.json", "a" * 250])
def test_a_trace_that_cannot_be_placed_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="choose another place for --trace"):
        write_trace(tmp_path / name, [])
