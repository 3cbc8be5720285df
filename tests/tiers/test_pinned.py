"""Slabs are registered to the byte and given back in time; where a system refuses, they stay pageable, and that is said."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest
import torch

from offload.host_place import HostMemory
from offload.tiers.pinned import pin
from offload.tiers.ram import Slab
from offload.units import PAGE

CARD = torch.device("cuda:0")


class Runtime:
    """What of the CUDA runtime is used."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 0 and address not in self.registered
        if sum(self.registered.values()) + nbytes > self.room:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime(10 * PAGE)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    return made


def test_a_slab_is_registered_to_the_byte_until_it_is_undone(runtime: Runtime) -> None:
    slab = Slab(3 * PAGE, huge_pages=False)
    undo = pin(slab, CARD)
    assert undo is not None and runtime.registered == {slab.address: slab.nbytes}
    undo()
    assert runtime.registered == {}
    slab.close()


def test_what_is_refused_stays_pageable_and_is_told_once(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[torch.device] = []
    monkeypatch.setattr("offload.tiers.pinned._forget_error", forgotten.append)
    small, large = Slab(2 * PAGE, huge_pages=False), Slab(9 * PAGE, huge_pages=False)
    assert pin(small, CARD) is not None
    with caplog.at_level(logging.WARNING, "offload"):
        assert pin(large, CARD) is None
    (record,) = caplog.records
    assert "36.0 KiB of host memory stay pageable" in record.getMessage() and "\n" not in record.getMessage()
    assert runtime.registered == {small.address: small.nbytes} and forgotten == [CARD]
    small.close()
    large.close()


def test_where_the_device_is_the_cpu_nothing_is_registered(runtime: Runtime) -> None:
    slab = Slab(PAGE, huge_pages=False)
    assert pin(slab, torch.device("cpu")) is None and runtime.registered == {}
    slab.close()


def test_slabs_of_a_place_are_given_back_before_they_are_freed(runtime: Runtime) -> None:
    with ExitStack() as stack:
        memory = HostMemory(stack, pin=lambda slab: pin(slab, CARD))
        slabs = [memory.slab(PAGE), memory.slab(2 * PAGE)]
        assert runtime.registered == {slab.address: slab.nbytes for slab in slabs}
    assert runtime.registered == {}
