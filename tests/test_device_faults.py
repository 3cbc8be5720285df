"""A device on a bad day, on `torch:cpu`: no memory, a copy that fails, a device that is gone, at any point of an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from test_engine import split_at

import offload
from offload.engine import Engine
from offload.errors import ClosedError, DeviceError
from offload.kernels.torch.ops import TorchOps
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

    def __call__(self, original: Callable[..., object]) -> Callable[..., object]:
        def faulty(*args: object, **options: object) -> object:
            self.calls += 1
            if self.at is not None and (self.calls == self.at or (self.forever and self.calls > self.at)):
                raise self.error
            return original(*args, **options)

        return faulty


@pytest.fixture(params=["llama", "olmoe"])
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Engine]:
    """Of the dense model, few matrices stay on the device, and the others pass through its ring; of "visitors" 4 experts."""
    model = tiny_checkpoint("olmoe" if request.param == "visitors" else request.param, tmp_path)
    if request.param == "visitors":
        monkeypatch.setattr("offload.plan.share_device", lambda banks, available: (4,))
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
