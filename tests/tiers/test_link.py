"""The link is measured with memory that is registered as the engine's is, and with pageable memory where none can be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from offload.tiers import link
from offload.tiers.link import measure_copies, measure_link
from offload.tiers.ram import Slab
from offload.tiers.vram import DeviceTier
from offload.units import MIB


class Host:
    """Memory on which a copy takes a second where it is pageable, a tenth where it is registered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, allows: bool) -> None:
        self.allows, self.registered, self.now, self.undone = allows, False, 0.0, 0
        monkeypatch.setattr(link, "pin", self.pin)
        monkeypatch.setattr(link.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(
            link, "_copy_in", lambda tier, slab: self.copy(DeviceTier.copy_in, tier, slab.view(0, MIB), 0)
        )
        back = torch.Tensor.copy_
        monkeypatch.setattr(torch.Tensor, "copy_", lambda *args, **options: self.copy(back, *args, **options))

    def pin(self, slab: Slab, device: torch.device) -> Callable[[], None] | None:
        self.registered = self.allows
        return self.undo if self.allows else None

    def undo(self) -> None:
        self.registered, self.undone = False, self.undone + 1

    def copy(self, work: Callable[..., object], *args: object, **options: object) -> object:
        before = self.now
        done = work(*args, **options)
        self.now = before + (0.1 if self.registered else 1.0)
        return done


def test_registered_memory_is_measured_where_the_system_lets_it_be(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, allows=True)
    assert measure_link("cpu", MIB) == pytest.approx(10 * MIB)
    assert measure_copies("cpu", MIB) == pytest.approx((MIB, MIB, 10 * MIB, 10 * MIB)) and host.undone == 2


def test_pageable_memory_is_measured_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, allows=False)
    assert measure_link("cpu", MIB) == pytest.approx(MIB)
    copies = measure_copies("cpu", MIB)
    assert copies[:2] == pytest.approx((MIB, MIB)) and copies[2:] == (None, None) and not host.undone


@pytest.mark.gpu
def test_a_card_has_a_link() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    copies = measure_copies("cuda")
    assert min(copies.pageable_in, copies.pageable_out, measure_link("cuda")) > 1e8
