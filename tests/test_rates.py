"""Speeds: what is probed, and what is remembered of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint

from offload.config import LoadConfig
from offload.demand import compute_seconds, dense_rate
from offload.elements import ElementType, kv_types
from offload.errors import StorageError
from offload.machine import MachineProfile, load_machine, save_machine
from offload.opening import Opened, open_model
from offload.rates import HOST_COPY_BPS, default_threads, machine_rates

KERNEL_BPS, DISK_BPS, REMEMBERED_BPS, LINK_BPS = 3e9, 2e9, 7e9, 24e9


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_model(tiny_checkpoint("llama", tmp_path_factory.mktemp("llama")), LoadConfig())


class Home:
    """Probes that count, and a cache folder of the test's own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.probes, self.patch = folder / "cache" / "machine.json", Counter[str](), monkeypatch
        monkeypatch.setattr("offload.rates.load_machine", lambda: load_machine(self.path))
        monkeypatch.setattr("offload.rates.save_machine", lambda profile: save_machine(profile, self.path))
        monkeypatch.setattr("offload.rates.measure_disk", self._probe("disk", DISK_BPS))
        monkeypatch.setattr("offload.rates.measure_attention", self._probe("attention", 1e-8))
        monkeypatch.setattr("offload.rates.measure_kernel", self._kernel)
        monkeypatch.setattr("offload.rates.is_measurable", lambda _: True)

    def _probe(self, name: str, value: float):
        return lambda *_, seconds: self.probes.update([name]) or value

    def _kernel(self, element: ElementType, threads: int, *, seconds: float, nbytes: int) -> float:
        self.probes[element.name] += 1
        return KERNEL_BPS

    def rates(self, opened: Opened, threads: int | None = None, device: str | None = None):
        """Rates, and what was probed for them."""
        self.probes.clear()
        made = machine_rates(
            opened.checkpoint, opened.model, kv_types("f16"), threads or default_threads(), device=device
        )
        return made, dict(self.probes)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(tmp_path, monkeypatch)


def saved(home: Home) -> MachineProfile:
    profile = load_machine(home.path)
    assert profile is not None
    return profile


def test_a_disk_is_probed_once_and_kernels_until_doctor_has_measured_them(home: Home, opened: Opened) -> None:
    rates, probed = home.rates(opened)
    assert probed == {"disk": 1, "F32": 1, "attention": 1}
    assert (rates.disk_bps, rates.kernel_bps, rates.attention_s) == (DISK_BPS, {"F32": KERNEL_BPS}, 1e-8)
    assert saved(home).kernel_bps == {}, "a short probe of kernels must not outlive the load"
    rates, probed = home.rates(opened)
    assert probed == {"F32": 1, "attention": 1} and rates.disk_bps == DISK_BPS
    save_machine(replace(saved(home), kernel_bps={"F32": REMEMBERED_BPS}), home.path)
    rates, probed = home.rates(opened)
    assert probed == {"attention": 1} and rates.kernel_bps == {"F32": REMEMBERED_BPS}
    rates, probed = home.rates(opened, threads=default_threads() + 1)
    assert probed["F32"] == 1 and rates.kernel_bps == {"F32": KERNEL_BPS}, "measured with other threads"


def test_what_a_small_file_tells_of_its_disk_is_not_remembered(home: Home, opened: Opened) -> None:
    home.patch.setattr("offload.rates.is_measurable", lambda _: False)
    for _ in range(2):
        assert home.rates(opened)[1]["disk"] == 1
    assert load_machine(home.path) is None


def test_a_home_that_cannot_be_written_costs_a_probe_and_no_load(home: Home, opened: Opened) -> None:
    def refuse(_: MachineProfile) -> None:
        raise StorageError("read-only")

    home.patch.setattr("offload.rates.save_machine", refuse)
    for _ in range(2):
        rates, probed = home.rates(opened)
        assert probed["disk"] == 1 and rates.disk_bps == DISK_BPS


def test_a_link_is_probed_once_for_each_card_and_the_cpu_has_none(home: Home, opened: Opened) -> None:
    home.patch.setattr("offload.tiers.link.measure_link", lambda device: home.probes.update([device]) or LINK_BPS)
    home.patch.setattr(
        "offload.tiers.link.device_name", lambda device: {"cuda": "A", "cuda:0": "A", "cuda:1": "B"}[device]
    )
    home.patch.setattr(
        "offload.kernels.torch.probe.measure_products", lambda device, names, rows: [(name, 3e11) for name in names]
    )
    home.patch.setattr(
        "offload.kernels.torch.probe.measure_attention",
        lambda model, dtype, device, threads: {"cuda": 1e-10, "cpu": 3e-8}[device.type],
    )
    home.patch.setattr("offload.kernels.torch.probe.measure_crossing", lambda device: 2e-5)
    found = [home.rates(opened, device=device) for device in ("cuda", "cuda:0", "cuda:1", "cuda:1")]
    for on_card in (rates for rates, _ in found):
        assert set(on_card.device_bps.values()) == {3e11} and on_card.device_bps.keys() == on_card.kernel_bps.keys()
        assert (on_card.attention_s, on_card.device_attention_s, on_card.crossing_s) == (3e-8, 1e-10, 2e-5)
        on_host = replace(on_card, device_bps={})
        assert compute_seconds(opened.model, on_card) < compute_seconds(opened.model, on_host)
        assert dense_rate(opened.model, on_card) == dense_rate(opened.model, on_host) == pytest.approx(KERNEL_BPS)
    assert [rates.link_bps for rates, _ in found] == [LINK_BPS] * 4
    assert [probed.get("cuda", 0) + probed.get("cuda:0", 0) + probed.get("cuda:1", 0) for _, probed in found] == [
        1,
        0,
        1,
        0,
    ]
    assert saved(home).links_bps == {"A": LINK_BPS, "B": LINK_BPS} and len(saved(home).disks_bps) == 1
    rates, _ = home.rates(opened, device="cpu")
    assert (rates.attention_s, rates.device_attention_s, rates.crossing_s) == (3e-8, 3e-8, 0.0)
    assert rates.link_bps == HOST_COPY_BPS and not rates.device_bps and set(saved(home).links_bps) == {"A", "B"}
