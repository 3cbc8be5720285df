"""A device on a bad day, on `torch:cpu`: no memory, a copy that fails, a device that is gone, at any point of a load or an
answer."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from test_engine import split_at
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from offload.demand import Rates
from offload.engine import Engine
from offload.errors import AllocationError, ClosedError, DeviceError
from offload.kernels.ggml.library import load_library
from offload.kernels.torch.ops import TorchOps
from offload.loader import Runner
from offload.tiers.ram import Slab
from offload.tiers.vram import DeviceTier

PROMPT = [7 * n % 250 for n in range(12)]
NO_MEMORY = r"out of memory \(Tried to allocate 2 GiB\); another program"
FAILED = r"the device failed \(CUDA error: unspecified launch failure\)"
CUDA_ERROR = (
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported.\nCompile with .."
)


class Fault:
    """Raises at one call of a method, or at that one and all later ones."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.at: int | None = None
        self.forever = False
        self.calls = 0

    def __call__(self, original: Callable[..., object], error: Exception | None = None) -> Callable[..., object]:
        def faulty(*args: object, **options: object) -> object:
            self.calls += 1
            if self.at is not None and (self.calls == self.at or (self.forever and self.calls > self.at)):
                raise error or self.error
            return original(*args, **options)

        return faulty


@pytest.fixture(params=["llama", "olmoe"])
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Engine]:
    """Of the dense model, few matrices stay on the device, and the others pass through its ring; of "visitors" 4 experts."""
    model = tiny_checkpoint("olmoe" if request.param == "visitors" else request.param, tmp_path)
    if request.param == "visitors":
        monkeypatch.setattr("offload.planning.share_device", lambda banks, available: (4,))
    if request.param == "llama":
        monkeypatch.setattr("offload.opening.make_plan", split_at(0.5, 0.1))
    return lambda: offload.load(model, ctx=64, kv_type="f32", device="torch:cpu")


dense = pytest.mark.parametrize("load", ["llama"], indirect=True)
copying = pytest.mark.parametrize("load", ["llama", "visitors"], indirect=True)


def answer(engine: Engine) -> tuple[int, ...]:
    return engine.generate(PROMPT, max_tokens=6, temperature=0, ignore_eos=True).tokens


def collect(engine: Engine, tokens: list[int]) -> None:
    """Tokens as they come, until something happens."""
    for chunk in engine.stream(PROMPT, max_tokens=60, temperature=0, ignore_eos=True):
        tokens += chunk.tokens


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Fault:
    fault = Fault(torch.OutOfMemoryError("Tried to allocate 2 GiB.\nGPU 0 has ..\n"))
    for name in ("linear", "attention", "route", "mix"):
        monkeypatch.setattr(TorchOps, name, fault(getattr(TorchOps, name)))
    return fault


def test_an_answer_goes_on_with_less_of_the_device_when_it_runs_out(
    load: Callable[[], Engine], no_memory: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    with load() as engine:
        expected, calls, budget = answer(engine), no_memory.calls, engine.plan.device_budget_bytes
        read = engine.statistics().io["nvme->ram"].bytes
    for at in range(1, calls, max(1, calls // 9)):
        no_memory.at = None
        with load() as engine:
            caplog.clear()
            no_memory.calls, no_memory.at = 0, at
            assert answer(engine) == expected
            assert engine.plan.device_budget_bytes < budget
            assert engine.statistics().io["nvme->ram"].bytes > read
            (warning,) = [record.getMessage() for record in caplog.records]
            assert warning.startswith("cpu: out of memory; loading anew, into ")
            assert answer(engine) == expected


def test_no_memory_again_and_again_ends_the_engine(load: Callable[[], Engine], no_memory: Fault) -> None:
    with load() as engine:
        no_memory.calls, no_memory.at, no_memory.forever = 0, 40, True
        with pytest.raises(DeviceError, match=r"cpu: out of memory, and the model needs [^;]*; close") as caught:
            answer(engine)
        assert "\n" not in str(caught.value)
        with pytest.raises(ClosedError, match="load the model again"):
            answer(engine)


@copying
@pytest.mark.parametrize("forever", [False, True], ids=["a copy fails", "the device is gone"])
def test_a_device_that_fails_ends_the_engine_with_one_line(
    load: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch, forever: bool
) -> None:
    fault = Fault(RuntimeError(CUDA_ERROR))
    monkeypatch.setattr(DeviceTier, "_copy", fault(DeviceTier._copy))
    if forever:
        monkeypatch.setattr(TorchOps, "linear", fault(TorchOps.linear))
    with load() as engine:
        loading, expected = fault.calls, answer(engine)
        per_answer = fault.calls - loading
    assert per_answer > 10
    for at in range(1, per_answer, max(1, per_answer // 9)):
        fault.calls, fault.at, fault.forever = 0, None, forever
        with load() as engine:
            fault.calls, fault.at = 0, at
            tokens: list[int] = []
            with pytest.raises(DeviceError, match=FAILED) as caught:
                collect(engine, tokens)
            assert "\n" not in str(caught.value) and tuple(tokens[:6]) == expected[: len(tokens)]
            with pytest.raises(ClosedError, match="load the model again"):
                answer(engine)


@dense
def test_a_device_that_fails_while_a_model_is_loaded_leaves_nothing(
    load: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.opening.make_plan", split_at(0.5, 0.9))
    fault = Fault(RuntimeError(CUDA_ERROR))
    monkeypatch.setattr(DeviceTier, "_copy", fault(DeviceTier._copy))
    tiers: list[DeviceTier] = []
    close = DeviceTier.close
    monkeypatch.setattr(DeviceTier, "close", lambda tier: (tiers.append(tier), close(tier)))
    load().close()
    copies = fault.calls
    assert copies > 5
    for at in range(1, copies + 1, 2):
        tiers.clear()
        fault.calls, fault.at = 0, at
        with pytest.raises(DeviceError, match=FAILED):
            load()
        assert tiers and all(tier.capacity_bytes == 0 for tier in tiers)


def test_other_mistakes_are_not_blamed_on_the_device(
    load: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(RuntimeError("shapes do not fit"))
    monkeypatch.setattr(TorchOps, "linear", fault(TorchOps.linear))
    with load() as engine:
        fault.calls, fault.at = 0, 3
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            answer(engine)


REFUSALS: dict[str, Exception] = {
    "torch.empty": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate ..\nframe"
    ),
    "torch.zeros": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has .."),
    "torch.Tensor.to": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has .."),
    "mmap.mmap": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "offload.tiers.ram._populate_by_kernel": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "numpy.zeros": MemoryError("Unable to allocate 8.00 KiB for an array with shape (8192,) and data type uint8"),
    "numpy.empty": MemoryError("Unable to allocate 8.00 KiB for an array with shape (8192,) and data type uint8"),
}
"""Whatever a load takes memory with, and what that raises when there is none."""


class Allocations(TorchDispatchMode):
    """The operations of torch that return memory which they were not given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if result.untyped_storage().data_ptr() not in given:
            self.seen.add(operation.overloadpacket.__name__)
        return result


class Made:
    """All slabs, tiers and backends of ggml that were made, and whether any is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.things: list[Any] = []
        self.backends = 0
        for kind in (Slab, DeviceTier):
            monkeypatch.setattr(kind, "__init__", self._noting(kind.__init__))
        for name, change in (("ggml_backend_cpu_init", 1), ("ggml_backend_free", -1)):
            monkeypatch.setattr(load_library(), name, self._counting(getattr(load_library(), name), change))

    def _noting(self, original: Callable[..., None]) -> Callable[..., None]:
        def noting(thing: object, *args: object, **options: object) -> None:
            self.things.append(thing)
            original(thing, *args, **options)

        return noting

    def _counting(self, original: Callable[..., int], change: int) -> Callable[..., int]:
        def counting(*args: int) -> int:
            self.backends += change
            return original(*args)

        return counting

    def check_gone(self) -> None:
        slabs = [thing for thing in self.things if isinstance(thing, Slab)]
        arenas = [thing._arena for thing in self.things if hasattr(thing, "_arena")]
        assert all(getattr(slab, "_region", None) is None for slab in slabs) and not any(a.numel() for a in arenas)
        assert not self.backends
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("offload")]
        self.things.clear()


@pytest.mark.parametrize(("family", "helped"), [("llama", False), ("olmoe", False), ("gpt_oss", True)])
def test_no_memory_at_any_point_of_a_load_is_one_line_and_leaves_nothing(
    family: str, helped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense blocks in all three tiers; experts on the device, in slots and on disk; and a host that computes some."""
    model = tiny_checkpoint(family, tmp_path, num_hidden_layers=2, layer_types=None)
    monkeypatch.setattr("offload.opening.machine_rates", lambda *_: Rates(disk_bps=1e9, kernel_bps={}, link_bps=8e9))
    monkeypatch.setattr("offload.opening.make_plan", split_at(0.2, 0.2 if family == "llama" else 1.0))
    monkeypatch.setattr("offload.planning.share_device", lambda banks, _: (3,) * len(banks))
    monkeypatch.setattr("offload.device_place.has_second_processor", lambda _: helped)
    allocations, load_all = Allocations(), Runner._load

    def load(runner: Runner, *args: Any) -> None:
        with allocations:
            load_all(runner, *args)

    monkeypatch.setattr(Runner, "_load", load)
    made, fault = Made(monkeypatch), Fault(MemoryError())
    for name, error in REFUSALS.items():
        monkeypatch.setattr(name, fault(resolve_name(name), error))

    def engine() -> Engine:
        fault.calls = 0
        return offload.load(model, ctx=64, kv_type="f32", device="torch:cpu")

    with engine() as loaded:
        points, expected = fault.calls, answer(loaded)
        assert {placement.tier for placement in loaded.plan.placements} == (
            {"vram"} if family != "llama" else {"vram", "ram", "nvme"}
        )
    assert allocations.seen == {"empty", "zeros"}, "else the list above lacks something"
    made.check_gone()
    for at in range(1, points + 1):
        fault.at = at
        with pytest.raises(AllocationError, match=r"memory.*--(ram|vram|ctx)") as caught:
            engine()
        assert "\n" not in str(caught.value)
        made.check_gone()
    fault.at = None
    with engine() as loaded:
        assert answer(loaded) == expected
