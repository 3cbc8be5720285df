"""The options that say how a model is opened, in llama.cpp's names, with their environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from offload.cli.text import user_path
from offload.errors import UsageError
from offload.trace import check_trace_place

_MEMORY: Final = "Memory and device"


def _check_trace(path: Path | None) -> Path | None:
    """The trace is written at the end, by a rename; what would fail then is refused before the model is loaded."""
    if path is None:
        return None
    if not path.parent.is_dir():
        raise UsageError(f"--trace {path}: no such folder {path.parent}")
    if path.exists() and not path.is_file():
        raise UsageError(f"--trace {path}: it is not a regular file; name a file to write")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--trace {path}: the folder {path.parent} is not writable; choose another place")
    check_trace_place(path)
    return path


class KVType(str, Enum):
    """Element types of the KV cache."""

    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class AutoChoice(str, Enum):
    """Whether something is done: while it pays, always, never."""

    auto = "auto"
    on = "on"
    off = "off"


def _memory(
    *names: str, about: str, env: str | None = None, low: float | None = None, high: float | None = None
) -> Any:
    return typer.Option(*names, help=about, envvar=env, show_default=False, rich_help_panel=_MEMORY, min=low, max=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Where the model may lie: the arguments that planning and loading share."""

    ram: Annotated[
        str | None,
        _memory(
            "--ram",
            about="Memory for the whole process, such as 6GiB, 3000M or minimum. Default: what is free.",
            env="OFFLOAD_RAM",
        ),
    ] = None
    vram: Annotated[str | None, _memory("--vram", about="Memory on the device.", env="OFFLOAD_VRAM")] = None
    ctx: Annotated[
        int | None,
        _memory(
            "--ctx",
            "--ctx-size",
            "-c",
            about="Context length in tokens. Default: the model's, at most 4096.",
            env="OFFLOAD_CTX",
        ),
    ] = None
    device: Annotated[
        str,
        _memory(
            "--device",
            about="auto, cpu, cuda:0 or torch:cpu. Default: auto, a CUDA card where one can be used, else the CPU.",
            env="OFFLOAD_DEVICE",
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        _memory("--threads", "-t", about="Compute threads. Default: as many as cores.", env="OFFLOAD_THREADS"),
    ] = None
    kv_type: Annotated[
        KVType,
        _memory(
            "--kv-type",
            about="Element type of the KV cache: f16, bf16, f32, or on the CPU q8_0 or q4_0. Default: f16.",
            env="OFFLOAD_KV_TYPE",
        ),
    ] = KVType.f16
    kv_type_k: Annotated[
        KVType | None,
        _memory(
            "--kv-type-k",
            "--cache-type-k",
            "-ctk",
            about="Element type of keys alone. Default: --kv-type.",
            env="OFFLOAD_KV_TYPE_K",
        ),
    ] = None
    kv_type_v: Annotated[
        KVType | None,
        _memory(
            "--kv-type-v",
            "--cache-type-v",
            "-ctv",
            about="Element type of values alone. Default: --kv-type.",
            env="OFFLOAD_KV_TYPE_V",
        ),
    ] = None

    kv_ram: Annotated[
        str | None,
        _memory(
            "--kv-ram",
            about="Memory for the KV cache; what is more lies on disk. Default: all of it, where --ram allows that.",
            env="OFFLOAD_KV_RAM",
        ),
    ] = None
    kv_dir: Annotated[
        Path | None,
        _memory("--kv-dir", about="Folder for what lies on disk. Default: the cache folder.", env="OFFLOAD_KV_DIR"),
    ] = None
    host_compute: Annotated[
        AutoChoice,
        _memory(
            "--host-compute",
            about="Have the CPU compute, beside a device, what lies in host memory: weights, experts, attention over a KV "
            "cache that the device has no room for. Default: auto, while it pays.",
            env="OFFLOAD_HOST_COMPUTE",
        ),
    ] = AutoChoice.auto

    def planning(self) -> dict[str, Any]:
        """The options by the names of `offload.load`'s arguments."""
        return {
            "ram": self.ram,
            "vram": self.vram,
            "ctx": self.ctx,
            "device": self.device,
            "threads": self.threads,
            "kv_type": self.kv_type.value,
            "kv_type_k": None if self.kv_type_k is None else self.kv_type_k.value,
            "kv_type_v": None if self.kv_type_v is None else self.kv_type_v.value,
            "kv_ram": self.kv_ram,
            "kv_dir": None if self.kv_dir is None else user_path(self.kv_dir),
            "host_compute": self.host_compute.value,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(PlanOptions):
    """How to open the model: the arguments of `offload.load`."""

    expert_policy: Annotated[
        str,
        _memory(
            "--expert-policy",
            about="Which expert makes room for another: auto, lru, lfu, lrfu-4, lrfu-16, lrfu-64, shallow, density, "
            "one-bit or regret. Default: auto, what a trace showed to be best, or lrfu-64.",
            env="OFFLOAD_EXPERT_POLICY",
        ),
    ] = "auto"
    prefetch: Annotated[
        AutoChoice,
        _memory(
            "--prefetch", about="Read experts ahead of need. Default: auto, while it pays.", env="OFFLOAD_PREFETCH"
        ),
    ] = AutoChoice.auto
    skip_experts_below: Annotated[
        float,
        _memory(
            "--skip-experts-below",
            about="Leave out experts with a smaller share of the router's weights. Costs quality.",
            env="OFFLOAD_SKIP_EXPERTS_BELOW",
            low=0,
            high=1,
        ),
    ] = 0.0
    expert_pack: Annotated[
        Path | None, _memory("--expert-pack", about="A side file of `offload pack`.", env="OFFLOAD_EXPERT_PACK")
    ] = None
    coarse_experts_below: Annotated[
        float,
        _memory(
            "--coarse-experts-below",
            about="Read missing experts with a smaller share of the router's weights by half. Costs quality.",
            env="OFFLOAD_COARSE_EXPERTS_BELOW",
            low=0,
            high=1,
        ),
    ] = 0.0
    workers: Annotated[
        int | None,
        _memory(
            "--workers",
            about="Disk requests in flight. Default: what suits the model.",
            env="OFFLOAD_WORKERS",
            low=1,
            high=512,
        ),
    ] = None
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            help="Write a timeline of compute, waits and reads (Chrome or Perfetto).",
            envvar="OFFLOAD_TRACE",
            show_default=False,
            rich_help_panel=_MEMORY,
            callback=_check_trace,
        ),
    ] = None

    def loading(self) -> dict[str, Any]:
        """All options by the names of `offload.load`'s arguments."""
        return {
            **self.planning(),
            "expert_policy": self.expert_policy,
            "prefetch": self.prefetch.value,
            "skip_experts_below": self.skip_experts_below,
            "expert_pack": None if self.expert_pack is None else user_path(self.expert_pack),
            "coarse_experts_below": self.coarse_experts_below,
            "workers": self.workers,
            "trace": self.trace is not None,
        }
