"""A card in one command: its tests, its copies, its kernels, decoding by how much of a model it holds, and a peer.

    python benchmarks/device.py --device cuda --models /tmp/bench

Under nine minutes on a card with the models on a local disk; `benchmarks/synthesize.py` makes them (dense-8b.gguf,
moe-16b.gguf, llama-1b), and a line says which are missing. Each line is in the result file as soon as it is measured, and
after `--seconds` nothing new is begun. `--device torch:cpu` runs the same to see that it works; its figures mean nothing and
are never filed in benchmarks/results.

What the columns are, and the bars, which apply to cards only:

- Tests marked `gpu`: all pass.
- A kernel's bandwidth is the bytes of its matrix over the time of a product with one token; the card's is that of a copy
  within its memory, read and written. Bar: 70%.
- "link reached": bytes that a token copies to the card, times tokens per second, over the bandwidth of pinned copies. Bar:
  90% where the link is the limit, which is at 25% and 50% of a dense model.
- "host computes" is the same engine with rows of matrices in host memory computed there (`host_compute`), as in no other
  line. Bar: faster where the link is the limit.
- "no overlap" is the same engine with one change: a block's copy is started when the block is needed and awaited at once, so
  the ring holds one block. Bar: overlap is faster wherever something is copied.
- Accelerate's CPU offload and ours, on one bfloat16 checkpoint with the same bytes of the card, all of which Accelerate may
  fill with weights. Bar: ours decodes faster.
- A share that is too small for a model is raised to its least, and the line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from harness.growing import Growing
from harness.results import RESULTS, ROOT

import offload
from offload.device_stream import DeviceStream
from offload.engine import plan_model
from offload.errors import BudgetError
from offload.kernels.torch.probe import COLUMNS, TYPES, measure_memory, measure_products
from offload.plan import Plan
from offload.tiers.link import Copies, measure_copies
from offload.units import MIB, format_rate, format_size

DENSE_SHARES, EXPERT_SHARES, PEER_SHARE = (0.25, 0.5, 0.75, 1.0), (0.1, 0.25, 0.5), 0.5
WITHOUT_OVERLAP = (0.25, 0.5)
CTX = 1024
TESTS_S, PEER_S = 150.0, 150.0  # at most
COLUMNS_OF_RUNS = (
    "model, on the device",
    "VRAM",
    "link a token",
    "decode tok/s",
    "prefill tok/s",
    "link reached",
    "hits",
)


@dataclass(frozen=True, slots=True)
class Run:
    """What all lines share."""

    options: argparse.Namespace
    device: torch.device
    report: Growing

    @property
    def prompt(self) -> list[int]:
        return [32 + 7 * number % 4000 for number in range(self.options.prompt_tokens)]


def main() -> None:
    options = arguments()
    device = torch.device(options.device.removeprefix("torch:"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, standing in"
    slug = "_".join(("device", *name.replace(",", "").split()))
    run = Run(options, device, Growing(slug, options.results, options.seconds))
    run.report.begin()
    run.report.add(f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}.")
    run.report.measure("Tests marked gpu:", lambda: [gpu_tests()])
    copies = link(run)
    kernels(run)
    run.report.begin(*COLUMNS_OF_RUNS)
    link_bps = copies.pinned_in or copies.pageable_in
    dense(run, options.models / "dense-8b.gguf", link_bps)
    experts(run, options.models / "moe-16b.gguf", link_bps)
    beside_accelerate(run, options.models / "llama-1b", link_bps)
    print(run.report.path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", type=Path, default=Path("/tmp/bench"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16384, help="of the matrix that kernels are measured on")
    parser.add_argument("--seconds", type=float, default=440, help="after which nothing new is begun")
    parser.add_argument(
        "--results", type=Path, help="folder of the result file; default: benchmarks/results, for a card"
    )
    options = parser.parse_args()
    on_card = options.device.startswith("cuda")
    if options.results is None:
        options.results = RESULTS if on_card else Path(tempfile.gettempdir())
    if not on_card and options.results.resolve().is_relative_to(RESULTS.resolve()):
        parser.error("--results: what the CPU measures in place of a card is not filed in benchmarks/results")
    return options


def gpu_tests() -> str:
    """The last line of pytest, which counts what passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_S, env=environment())
    except subprocess.TimeoutExpired:
        return f"no end within {TESTS_S:g} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "; ".join([last_line(done.stdout) or last_line(done.stderr), *failed[:8]])


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def link(run: Run) -> Copies:
    """Copies of both kinds both ways: all else is a share of these, so a failure ends the run."""
    copies = measure_copies(str(run.device))
    run.report.begin("copies", "to the device", "back")
    run.report.add("pinned", *(format_rate(bps) if bps else "refused" for bps in (copies.pinned_in, copies.pinned_out)))
    run.report.add("pageable", format_rate(copies.pageable_in), format_rate(copies.pageable_out))
    return copies


def kernels(run: Run) -> None:
    """The bandwidth of a product of one token, by type."""
    memory_bps = measure_memory(run.device)
    run.report.begin("type", "product of one token", f"of the card's memory ({format_rate(memory_bps)})")

    def row(name: str) -> list[str]:
        ((_, bps),) = measure_products(run.device, [name], run.options.rows, COLUMNS)
        return [format_rate(bps), f"{bps / memory_bps:.0%}"]

    for name in TYPES:
        run.report.measure(name, partial(row, name))


class Needs:
    """What is always on the device, and what all dense matrices and all experts take there."""

    def __init__(self, model: Path, device: str) -> None:
        demand = plan_model(model, device=device, ctx=CTX, host_compute="off").demand  # the KV cache is on the card
        assert demand.device_fixed is not None
        self.fixed = sum(demand.device_fixed.values())
        self.dense = sum(block.footprint for block in demand.blocks)
        self.experts = sum(bank.num_experts * bank.device_bytes for bank in demand.banks)

    def vram(self, dense: float, experts: float = 0.0) -> int:
        return self.fixed + int(dense * self.dense) + int(experts * self.experts) + MIB


def dense(run: Run, model: Path, link_bps: float) -> None:
    for share in DENSE_SHARES:
        line = partial(decode, run, model, link_bps, dense=share)
        run.report.measure(f"{model.stem}, {share:.0%}", line)
        if share in WITHOUT_OVERLAP:
            run.report.measure(f"{model.stem}, {share:.0%}, host computes", partial(line, host_compute="on"))
            run.report.measure(f"{model.stem}, {share:.0%}, no overlap", partial(line, overlap=False))


def experts(run: Run, model: Path, link_bps: float) -> None:
    for share in EXPERT_SHARES:
        line = partial(decode, run, model, link_bps, experts=share)
        run.report.measure(f"{model.stem}, {share:.0%} of experts", line)


def decode(
    run: Run,
    model: Path,
    link_bps: float,
    *,
    dense: float = 1.0,
    experts: float = 0.0,
    overlap: bool = True,
    host_compute: str = "off",
) -> Sequence[str]:
    """One load, a run to warm up, and one that counts."""
    check_there(model)
    wanted = Needs(model, run.options.device).vram(dense, experts)
    vram, raised = possible(model, run.options.device, wanted, host_compute)
    settings = {"temperature": 0, "ignore_eos": True, "max_tokens": run.options.tokens}
    with (
        nullcontext() if overlap else without_overlap(),
        offload.load(model, device=run.options.device, vram=vram, ctx=CTX, host_compute=host_compute) as engine,
    ):
        engine.generate(run.prompt, **settings)
        done = engine.generate([5, *run.prompt[1:]], **settings)  # another first token: nothing is cached
        plan: Plan = engine.plan
    moved_bps = plan.link_bytes * done.timings.decode_tps
    return [
        format_size(vram) + raised,
        format_size(plan.link_bytes),
        f"{done.timings.decode_tps:.3g}",
        f"{done.timings.prefill_tps:.3g}",
        f"{moved_bps / link_bps:.0%}" if plan.link_bytes else "-",
        "-" if done.experts is None else f"{done.experts.hit_rate:.0%}",
    ]


def check_there(model: Path) -> None:
    if not model.exists():
        raise FileNotFoundError(f"python benchmarks/synthesize.py {model.stem} {model} makes it")


def possible(model: Path, device: str, vram: int, host_compute: str = "off") -> tuple[int, str]:
    """The budget, or the least that the model needs."""
    try:
        plan_model(model, device=device, vram=vram, ctx=CTX, host_compute=host_compute)
    except BudgetError as error:
        return error.minimum_bytes, ", raised to the least"
    return vram, ""


@contextmanager
def without_overlap() -> Iterator[None]:
    """Nothing is copied ahead: `acquire` starts the copy of the block that it is asked for, and waits for it."""
    with patch.object(DeviceStream, "fill", lambda _: None):
        yield


def beside_accelerate(run: Run, model: Path, link_bps: float) -> None:
    name = f"{model.stem}, {PEER_SHARE:.0%}"
    run.report.measure(name, partial(decode, run, model, link_bps, dense=PEER_SHARE))
    run.report.measure(f"{name}, Accelerate", partial(accelerate, run, model))


def accelerate(run: Run, model: Path) -> Sequence[str]:
    """The peer, in a process of its own: what it lacks ends that, and is the line."""
    check_there(model)
    vram, _ = possible(model, run.options.device, Needs(model, run.options.device).vram(PEER_SHARE))
    device = "cuda:0" if str(run.device) == "cuda" else str(run.device)
    script = ROOT / "benchmarks" / "peers" / "accelerate_device.py"
    sizes = {"--vram": vram, "--tokens": run.options.tokens, "--prompt-tokens": run.options.prompt_tokens}
    flags = [text for name, size in sizes.items() for text in (name, str(size))]
    command = [sys.executable, str(script), str(model), "--device", device, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_S, env=environment(), check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"peer"')]
    if done.returncode or not lines:
        raise RuntimeError(last_line(done.stderr) or f"exit {done.returncode}")
    figures = json.loads(lines[-1])
    return [format_size(vram), "-", f"{figures['decode_tps']:.3g}", f"{figures['prefill_tps']:.3g}", "-", "-"]


if __name__ == "__main__":
    main()
