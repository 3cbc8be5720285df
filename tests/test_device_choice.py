"""`auto` takes a card only where driver, torch and a first kernel agree; what stands in the way is one line."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints import tiny_checkpoint
from typer.testing import CliRunner

from offload.cli.main import app
from offload.config import LoadConfig
from offload.device_choice import choose_device
from offload.errors import BackendError, UsageError
from offload.kernels.torch.usable import check_usable
from offload.opening import torch_device
from offload.tiers.cuda_driver import Cards, find_cards


class Driver:
    """What of libcuda is used."""

    def __init__(self, cards: int, init: int = 0, count: int = 0) -> None:
        self.cards, self.init, self.code = cards, init, count

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.init

    def cuDeviceGetCount(self, found: Any) -> int:  # noqa: N802
        found._obj.value = self.cards
        return self.code


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    choose_device.cache_clear()
    yield
    choose_device.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A machine with these cards, a torch built for this CUDA (None: no torch), and this answer of a first kernel."""

    def make(driver: object, built_for: str | None = "'12.8'", usable: Exception | None = None) -> None:
        def library(_: str) -> object:
            if isinstance(driver, Exception):
                raise driver
            return driver

        def usable_or_not(_: str) -> None:
            warnings.warn("CUDA initialization: several\nlines", stacklevel=1)
            if usable is not None:
                raise usable

        own = SimpleNamespace(CDLL=library, c_int=ctypes.c_int, byref=ctypes.byref)
        monkeypatch.setattr("offload.tiers.cuda_driver.ctypes", own)
        monkeypatch.setattr("offload.device_choice.find_cards", find_cards)
        (tmp_path / "version.py").write_text(f"debug = False\ncuda: Optional[str] = {built_for}\nhip = None\n")
        spec = None if built_for is None else ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr("offload.device_choice.find_spec", lambda _: spec)
        monkeypatch.setattr("offload.kernels.torch.usable.check_usable", usable_or_not)

    return make


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        (OSError("no such file"), Cards(0, has_driver=False)),
        (object(), Cards(0, has_driver=False)),
        (Driver(0), Cards(0)),
        (Driver(2), Cards(2)),
        (Driver(2, init=34), Cards(0, has_driver=False)),
        (Driver(2, init=100), Cards(0)),
        (Driver(2, init=803), Cards(0, error=803)),
        (Driver(2, count=999), Cards(0, error=999)),
    ],
)
def test_whatever_the_driver_does_is_an_answer(machine: Callable[..., None], driver: object, found: Cards) -> None:
    machine(driver)
    assert find_cards() == found


@pytest.mark.parametrize(
    ("driver", "torch", "usable", "device", "words"),
    [
        (OSError(), "'12.8'", None, None, ""),
        (Driver(0), "'12.8'", None, None, ""),
        (Driver(1), "'12.8'", None, "cuda", ""),
        (Driver(1, init=803), "'12.8'", None, None, "CUDA error 803"),
        (Driver(1), None, None, None, "pip install torch"),
        (Driver(1), "None", AssertionError("torch must stay out"), None, "built without CUDA: pip install"),
        (Driver(1), "'12.8'", BackendError("device cuda: the driver is too old; renew it"), None, "too old; renew it"),
        (Driver(1), "'12.8'", ImportError("libcudart.so is broken"), None, "libcudart.so is broken"),
    ],
)
def test_a_card_is_taken_where_it_can_be_used(
    machine: Callable[..., None], driver: object, torch: str | None, usable: Exception | None, device: str | None,
    words: str,
) -> None:  # fmt: skip
    machine(driver, torch, usable)
    choice = choose_device()
    assert choice.device == device == torch_device(LoadConfig())
    assert words in choice.note and bool(words) == bool(choice.note) and "\n" not in choice.note
    if device is None:
        with pytest.raises(
            UsageError, match=r"^vram: .*(no card|although there is a card).*--device torch:cpu$"
        ) as caught:
            torch_device(LoadConfig(vram=2**30))
        assert words in str(caught.value)
    else:
        assert torch_device(LoadConfig(vram=2**30)) == device


def test_torch_stays_out_where_there_is_no_card(tmp_path: Path) -> None:
    code = (
        "import ctypes, sys\ndef none(*_, **__): raise OSError\nctypes.CDLL = none\n"
        "from offload.device_choice import choose_device\n"
        "assert choose_device() == (None, '') and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_says_why_a_card_is_left_alone(machine: Callable[..., None], tmp_path: Path) -> None:
    machine(Driver(1), "None")
    model = tiny_checkpoint("llama", tmp_path)
    runs = [CliRunner().invoke(app, ["plan", str(model), *more]) for more in ([], ["--device", "cpu"])]
    note = f"offload: note: {choose_device().note}\n"
    assert [run.exit_code for run in runs] == [0, 0] and note.startswith("offload: note: --device auto takes the CPU")
    assert runs[0].stderr.count(note) == 1 and note not in runs[1].stderr


def test_a_kernel_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_usable("cpu")

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr("offload.kernels.torch.usable.torch.zeros", fails)
    with pytest.raises(
        BackendError, match=r"^device cpu: a first kernel fails there \(CUDA error: no kernel image .*cpu$"
    ):
        check_usable("cpu")
