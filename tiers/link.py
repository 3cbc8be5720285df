"""How fast bytes cross between host memory and a device: from registered memory, as slabs are, and from pageable.

Knows nothing of models. Called from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from offload.tiers.pinned import pin
from offload.tiers.ram import Slab
from offload.tiers.vram import DeviceTier
from offload.units import MIB

PROBE_BYTES = 64 * MIB
REPETITIONS = 4


class Copies(NamedTuple):
    """Bytes per second, to the device and back; those of registered memory are None where the system lets none be."""

    pageable_in: float
    pageable_out: float
    pinned_in: float | None
    pinned_out: float | None


def measure_copies(device: str, nbytes: int = PROBE_BYTES) -> Copies:
    """All four.

    Raises:
        AllocationError: the device or the host has no such room.
        DeviceError: the device has failed.
    """
    tier, slab = DeviceTier(device, nbytes), Slab(nbytes)
    try:
        pageable = _both_ways(tier, slab)
        undo = pin(slab, tier.device)
        if undo is None:
            return Copies(*pageable, None, None)
        try:
            return Copies(*pageable, *_both_ways(tier, slab))
        finally:
            undo()
    finally:
        tier.close()
        slab.close()


def measure_link(device: str, nbytes: int = PROBE_BYTES) -> float:
    """Bytes per second to the device as the engine's slabs get them: registered where the system lets them be.

    Raises:
        AllocationError, DeviceError: as `measure_copies`.
    """
    tier, slab = DeviceTier(device, nbytes), Slab(nbytes)
    undo = pin(slab, tier.device)
    try:
        return _rate(tier.device, slab.nbytes, lambda: _copy_in(tier, slab))
    finally:
        if undo is not None:
            undo()
        tier.close()
        slab.close()


def device_name(device: str) -> str:
    """What the maker calls it; what is known of one card holds for another of its name."""
    return str(torch.cuda.get_device_name(device))


def _both_ways(tier: DeviceTier, slab: Slab) -> tuple[float, float]:
    host, there = torch.frombuffer(slab.view(0, slab.nbytes), dtype=torch.uint8), tier.view(0, slab.nbytes)
    into = _rate(tier.device, slab.nbytes, lambda: _copy_in(tier, slab))
    return into, _rate(tier.device, slab.nbytes, lambda: host.copy_(there, non_blocking=True))


def _copy_in(tier: DeviceTier, slab: Slab) -> object:
    return tier.copy_in(slab.view(0, slab.nbytes), 0)


def _rate(device: torch.device, nbytes: int, start: Callable[[], object]) -> float:
    start()  # the first one finds the device asleep
    _settle(device)
    start_s = time.perf_counter()
    started = [start() for _ in range(REPETITIONS)]
    _settle(device)
    return len(started) * nbytes / (time.perf_counter() - start_s)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
