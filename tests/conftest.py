from __future__ import annotations

from pathlib import Path

import pytest
from support.demo import demo_model
from support.devices import PLACES, decide_for_triton, torch_runs_on, triton_runs_on

from offload.machine import MachineProfile, device_id, host_fingerprint
from offload.tiers.cuda_driver import Cards

decide_for_triton()


@pytest.fixture(scope="module", params=PLACES)
def device(request: pytest.FixtureRequest) -> str:
    """Where torch's own kernels run."""
    return torch_runs_on(request.param)


@pytest.fixture(scope="module", params=PLACES)
def triton_device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: interpreted or compiled, see `support.devices`."""
    return triton_runs_on(request.param)


@pytest.fixture(scope="session")
def demo() -> Path:
    return demo_model()


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plans in tests follow these speeds: no probe runs, and nobody's cached profile is read or written."""
    profile = MachineProfile(
        host=host_fingerprint(), disks_bps={device_id(tmp_path): 1e9}, ram_bps=2e10, kernel_bps={"F32": 1e10, "Q4_1": 1e10},
        measured_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("offload.rates.load_machine", lambda: profile)
    monkeypatch.setattr("offload.rates.save_machine", lambda _: None)


@pytest.fixture(autouse=True)
def _no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the CPU in tests, on every machine; those marked `gpu` name their device."""
    monkeypatch.setattr("offload.device_choice.find_cards", lambda: Cards(0))
