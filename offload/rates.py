"""The speeds that a plan rests on: what is cached for this machine, and a short probe of what is not.

A disk is probed once, with the first model on it, and so is the link to a device; both are remembered. Kernels are
remembered by `offload doctor` alone: a probe of milliseconds beside other work could be wrong by far, and that must not
outlive the load that it was made for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import psutil

from offload.demand import Rates
from offload.elements import KVTypes, element_type
from offload.errors import StorageError
from offload.kernels.ggml.probe import PROBE_BYTES, measure_attention, measure_kernel
from offload.machine import MachineProfile, device_id, host_fingerprint, load_machine, save_machine
from offload.models.base import Model
from offload.models.checkpoint.base import Checkpoint
from offload.tiers.probe import is_measurable, measure_disk

DISK_PROBE_S: Final = 0.5
SMALL_FILE_PROBE_S: Final = 0.05  # for each load: what it finds is not remembered
KERNEL_PROBE_S: Final = 0.03
DEVICE_PROBE_ROWS: Final = 8192  # of 8192 elements: more bytes than a card's cache holds, and less than a model needs
HOST_COPY_BPS: Final = 8e9  # `torch:cpu` stands in for a card


def machine_rates(
    checkpoint: Checkpoint, model: Model, kv_types: KVTypes, threads: int, probe_bytes: int = PROBE_BYTES,
    device: str | None = None,
) -> Rates:  # fmt: skip
    """The rates for this model: its disk, the CPU kernels of its element types, attention in its shape.

    Args:
        probe_bytes: memory that a probe of kernels may use. device: whose link is measured; None where there is none.

    Raises:
        StorageError: the model's file cannot be read.
    """
    profile = load_machine() or MachineProfile(
        host=host_fingerprint(), disks_bps={}, ram_bps=0.0, kernel_bps={}, measured_at=_now()
    )
    known = profile.kernel_bps if threads == default_threads() else {}
    names = sorted({info.element.name for info in model.all_matrices()})
    kernels = {
        name: known.get(name) or measure_kernel(element_type(name), threads, seconds=KERNEL_PROBE_S, nbytes=probe_bytes)
        for name in names
        if element_type(name).in_ggml
    }
    disks, disk_bps = _disk_rate(largest_file(checkpoint), profile.disks_bps)
    links, link_bps = _link_rate(device, profile.links_bps)
    if (disks, links) != (profile.disks_bps, profile.links_bps):
        _remember(replace(profile, disks_bps=disks, links_bps=links, measured_at=_now()))
    rates = Rates(disk_bps=disk_bps, kernel_bps=kernels, device_bps=_device_rates(device, names), link_bps=link_bps)
    if device is None:
        return replace(rates, attention_s=measure_attention(model.config, kv_types, threads, seconds=KERNEL_PROBE_S))
    from offload.kernels.torch.probe import measure_attentions

    host_s, device_s, crossing_s = measure_attentions(model, kv_types, device, threads)
    return replace(rates, attention_s=host_s, device_attention_s=device_s, crossing_s=crossing_s)


def _disk_rate(file: Path, known: Mapping[str, float]) -> tuple[Mapping[str, float], float]:
    """Bytes per second that the file's disk gives, and what is known of disks from now on."""
    disk = device_id(file)
    if disk in known:
        return known, known[disk]
    tells = is_measurable(file)
    found = measure_disk(file, seconds=DISK_PROBE_S if tells else SMALL_FILE_PROBE_S)
    return {**known, disk: found} if tells else known, found


def _link_rate(device: str | None, known: Mapping[str, float]) -> tuple[Mapping[str, float], float]:
    """Bytes per second from host memory to the device, and what is known of devices from now on."""
    if device is None or device == "cpu":
        return known, HOST_COPY_BPS
    from offload.tiers.link import device_name, measure_link

    name = device_name(device)
    known = known if name in known else {**known, name: measure_link(device)}
    return known, known[name]


def _device_rates(device: str | None, names: Sequence[str]) -> Mapping[str, float]:
    """Bytes of weights per second of the device's own kernels; none where the CPU stands in."""
    if device is None or device == "cpu":
        return {}
    from offload.kernels.torch.probe import measure_products

    return dict(measure_products(device, names, DEVICE_PROBE_ROWS))


def default_threads() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


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
