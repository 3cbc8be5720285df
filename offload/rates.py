"""The speeds that a plan rests on: what is cached for this machine, and a short probe of what is not, cached in turn."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from offload.demand import Rates
from offload.elements import element_type
from offload.errors import StorageError
from offload.kernels.ggml.probe import measure_kernel
from offload.machine import MachineProfile, device_id, host_fingerprint, load_machine, save_machine
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.tiers.probe import measure_disk

PROBE_S: Final = 0.5
HOST_COPY_BPS: Final = 8e9  # `torch:cpu` stands in for a card


def machine_rates(checkpoint: Checkpoint, model: Model, threads: int) -> Rates:
    """The rates for this model: its disk, and the CPU kernels of its element types.

    Raises:
        StorageError: the model's file cannot be read.
    """
    cached = load_machine()
    profile = cached or MachineProfile(
        host=host_fingerprint(), disks_bps={}, ram_bps=0.0, kernel_bps={}, measured_at=_now()
    )
    kernels = dict(profile.kernel_bps)
    for name in sorted({info.element.name for info in model.matrices.values()} - kernels.keys()):
        kernels[name] = measure_kernel(element_type(name), threads)
    file = largest_file(checkpoint)
    disk, disks = device_id(file), dict(profile.disks_bps)
    if disk not in disks:
        disks[disk] = measure_disk(file, seconds=PROBE_S)
    if len(kernels) > len(profile.kernel_bps) or len(disks) > len(profile.disks_bps):
        _remember(replace(profile, kernel_bps=kernels, disks_bps=disks, measured_at=_now()))
    return Rates(disk_bps=disks[disk], kernel_bps=kernels, link_bps=HOST_COPY_BPS)


def largest_file(checkpoint: Checkpoint) -> Path:
    """The file to measure the disk with."""
    return max(checkpoint.files, key=lambda path: path.stat().st_size)


def _remember(profile: MachineProfile) -> None:
    try:
        save_machine(profile)
    except StorageError:
        pass  # a read-only home costs the next load a second, nothing else


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
