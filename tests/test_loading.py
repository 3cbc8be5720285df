"""Places and the loader: bytes where the plan wants them, and after a failure at any read nothing that was made is left."""

from __future__ import annotations

import ctypes
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint
from test_engine import budget_at, split_at

from offload.backends import make_place
from offload.blocks import BlockKey
from offload.config import LoadConfig
from offload.device_place import DevicePlace
from offload.embedding import EmbeddingTable
from offload.errors import BudgetError, StorageError
from offload.kernels.ggml.backend import GgmlBackend
from offload.kernels.torch.backend import TorchBackend
from offload.loader import load_runner
from offload.opening import Footprint, Opened, open_model, plan_for
from offload.places import Place
from offload.rates import Rates
from offload.stream import BlockStream
from offload.telemetry import Telemetry
from offload.tiers.files import LocalStorage
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import Slab
from offload.tiers.vram import DeviceTier
from offload.tiers.wrapper import Fault, FaultyStorage
from offload.units import MIB

RATES = Rates(disk_bps=1e9, kernel_bps={}, link_bps=8e9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def opened(model: Path) -> Opened:
    return open_model(model, LoadConfig(ctx=64))


@pytest.fixture(autouse=True)
def _no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.opening.machine_rates", lambda *_: RATES)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was made and not closed yet: memory, backends, readers, streams, open models."""
    made: list[object] = []

    def watch(kind: type) -> None:
        init, close = kind.__init__, kind.close  # type: ignore[attr-defined]

        def started(self: object, *args: object, **options: object) -> None:
            init(self, *args, **options)
            made.append(self)

        def closed(self: object) -> None:
            close(self)
            made[:] = [other for other in made if other is not self]

        monkeypatch.setattr(kind, "__init__", started)
        monkeypatch.setattr(kind, "close", closed)

    for kind in (Slab, GgmlBackend, TorchBackend, DeviceTier, NvmeReader, BlockStream, EmbeddingTable, Opened):
        watch(kind)
    return made


def split(device: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """This share of the blocks in every tier that the device has, the others below."""
    planner = budget_at(share) if device == "cpu" else split_at(share, share)
    monkeypatch.setattr("offload.opening.make_plan", planner)


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_a_load_that_fails_at_any_read_leaves_no_thread_no_memory_and_no_file(
    model: Path, device: str, alive: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    split(device, 0.4, monkeypatch)
    config = LoadConfig(ctx=64, device=device)
    threads, files = threading.active_count(), psutil.Process().open_files()
    counted = FaultyStorage(LocalStorage(), [])
    runner = load_runner(model, config, storage=counted)
    needed = counted.reads
    assert len(alive) > 5 and threading.active_count() > threads
    runner.close()
    runner.close()
    assert (alive, threading.active_count(), psutil.Process().open_files()) == ([], threads, files)
    failures = 0
    for at in range(1, needed + 1):
        try:
            load_runner(model, config, storage=FaultyStorage(LocalStorage(), [Fault(at=at, kind="eio")])).close()
        except StorageError as error:
            failures += 1
            assert str(model) in str(error)
        assert (alive, threading.active_count(), psutil.Process().open_files()) == ([], threads, files), at
    assert failures > 10


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_every_block_is_placed_where_its_bytes_are_pass_after_pass(
    model: Path, device: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoadConfig(ctx=64, device=device)
    split(device, share, monkeypatch)
    placed: dict[BlockKey, int] = {}
    for backend in (GgmlBackend, TorchBackend):
        monkeypatch.setattr(backend, "place", lambda _, key, address: placed.__setitem__(key, address))
    opened = open_model(model, config)
    with ExitStack() as stack:
        place = make_place(opened, config, stack)
        plan = plan_for(opened, config, place.footprint())
        reader = NvmeReader(LocalStorage(), opened.checkpoint.files, 2)
        stack.callback(reader.close)
        residency = place.fill(plan, reader, Telemetry(), None)
        stack.callback(reader.close)
        blocks = plan.demand.blocks
        groups = [[blocks[index] for index in group] for group in plan.demand.groups]
        assert set(placed) == {block.key for block in blocks} - plan.streamed, "what is pinned is placed at once"
        assert bool(plan.streamed) == (share < 1)
        for _ in range(2):
            for group in groups:
                streamed = [block.key for block in group if block.key in plan.streamed]
                residency.acquire(len(group) - len(streamed), streamed, None)
                for block in group:
                    assert block.extent is not None
                    with block.extent.path.open("rb") as file:
                        file.seek(block.extent.offset)
                        assert bytes_at(place, placed[block.key], block.nbytes) == file.read(block.nbytes), block.key
                residency.release(streamed)


def bytes_at(place: Place, address: int, nbytes: int) -> bytes:
    if isinstance(place, DevicePlace) and place._tier is not None:
        return place._tier.view(address, nbytes).numpy().tobytes()
    return ctypes.string_at(address, nbytes)


@given(rss=st.integers(0, 2**30), grown=st.integers(0, 7 * MIB), beyond=st.integers(0, 2**24))
def test_a_minimum_that_was_named_still_holds_when_the_process_has_grown(
    opened: Opened, rss: int, grown: int, beyond: int
) -> None:
    footprint = Footprint(
        in_parts=True, kv_bytes=MIB, workspace_bytes=MIB, prompt_bytes=MIB, micro_batch_bytes=MIB, lends=True
    )
    used = {"rss": rss}

    class Process:
        def memory_info(self) -> SimpleNamespace:
            return SimpleNamespace(**used)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.opening.psutil.Process", Process)
        with pytest.raises(BudgetError) as refused:
            plan_for(opened, LoadConfig(ram=1), footprint)
        named = refused.value.minimum_bytes
        assert named is not None and plan_for(opened, LoadConfig(ram="minimum"), footprint).budget_bytes == named
        used["rss"] = rss + grown
        plan = plan_for(opened, LoadConfig(ram=named + beyond), footprint)
    assert rss + grown < plan.base_bytes and plan.used_bytes <= plan.budget_bytes == named + beyond
