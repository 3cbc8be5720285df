"""What `offload doctor` measured on this machine, kept as JSON in the user's cache folder for the planner to read.

A profile of another machine (a home folder on a network, a copied disk image) is ignored: it carries a fingerprint of the
host. A broken or unreadable file counts as no profile, for the planner has defaults and the next `doctor` writes it anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from platformdirs import user_cache_path

from offload.errors import StorageError
from offload.writing import PRIVATE, beside

_FORMAT: Final = 4
_MAPPINGS: Final = ("disks_bps", "kernel_bps", "links_bps")
_MEMORY_INFO: Final = Path("/proc/meminfo")
_CPU_INFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineProfile:
    """Measured speeds in bytes/s.

    Attributes:
        host: fingerprint of the machine, see `host_fingerprint`.
        disks_bps: direct reads in the engine's own size and depth, by `device_id` of the disk.
        ram_bps: all cores reading host memory; 0 when not measured.
        kernel_bps: weights that matrix kernels of the CPU take in at batch 1 on all physical cores, by element type;
            empty when not measured.
        measured_at: ISO 8601, UTC.
        links_bps: copies from host memory to a device, as the engine's memory is copied, by the device's name.
    """

    host: str
    disks_bps: Mapping[str, float]
    ram_bps: float
    kernel_bps: Mapping[str, float]
    measured_at: str
    links_bps: Mapping[str, float] = field(default_factory=dict)


def host_fingerprint() -> str:
    """Hex digest of the host's name, its processor, its cores and its memory: what the measured speeds depend on."""
    facts = (platform.node(), platform.machine(), cpu_name(), str(os.cpu_count()), _memory_total())
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def device_id(path: Path) -> str:
    """The disk that holds `path`, as the kernel numbers it. Stable on one machine, which is where a profile is read."""
    return str(path.stat().st_dev)


def cpu_name() -> str:
    """The processor as its maker names it, else the architecture."""
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def load_machine(path: Path | None = None) -> MachineProfile | None:
    """The profile of this very machine, or None when there is none that can be used."""
    try:
        record = json.loads((path or profile_path()).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    profile = _parse(record)
    return profile if profile is not None and profile.host == host_fingerprint() else None


def save_machine(profile: MachineProfile, path: Path | None = None) -> Path:
    """Write `profile` in one step (temporary file, rename) and return its path.

    Raises:
        StorageError: the folder cannot be written.
    """
    path = path or profile_path()
    mappings = {name: dict(getattr(profile, name)) for name in _MAPPINGS}
    record = {"format": _FORMAT, **asdict(profile), **mappings}
    write_record(path, record)
    return path


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON object in one step.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path, mode=PRIVATE) as temporary:
            temporary.write_text(json.dumps(record, indent=1))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", path=str(path), errno=error.errno) from error


def profile_path() -> Path:
    """`machine.json` in the user's cache folder."""
    return user_cache_path("offload") / "machine.json"


def _memory_total() -> str:
    try:
        return next((line for line in _MEMORY_INFO.read_text().splitlines() if line.startswith("MemTotal")), "")
    except OSError:
        return ""


def _parse(record: Any) -> MachineProfile | None:
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        return None
    speeds = [number for name in _MAPPINGS for number in _values(record.get(name))]
    if not all(isinstance(number, int | float) and 0 < number < 1e15 for number in speeds):
        return None
    ram = record.get("ram_bps")
    if not isinstance(ram, int | float) or not 0 <= ram < 1e15:
        return None
    texts = [record.get("host"), record.get("measured_at")]
    if not all(isinstance(text, str) for text in texts):
        return None
    return MachineProfile(**{name: record[name] for name in MachineProfile.__slots__})


def _values(kernels: Any) -> list[Any]:
    return list(kernels.values()) if isinstance(kernels, dict) else [None]
