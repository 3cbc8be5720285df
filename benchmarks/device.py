"""A card: its kernels beside its memory, the link beside its copies, and decoding by how much of a model it holds.

    python benchmarks/device.py --device cuda --dense /tmp/bench/dense-8b.gguf --moe /tmp/bench/moe-16b.gguf

Under nine minutes on a card with both models on a local disk. `--device torch:cpu` runs the same and measures nothing of
use. A product's bandwidth is the bytes of its matrix over its time; the card's is that of a copy within its memory, read
and written. A share that is too small for a model is raised to its least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness.results import ROOT, table, write

import offload
from offload.elements import element_type
from offload.engine import plan_model
from offload.errors import BudgetError
from offload.kernels.torch.products import products_for
from offload.plan import Plan
from offload.tiers.vram import measure_copies
from offload.units import MIB, format_rate, format_size

TYPES = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4", "F16", "BF16")
DENSE_SHARES, EXPERT_SHARES = (0.25, 0.5, 0.75, 1.0), (0.1, 0.25, 0.5)
PROMPT = [11 + 7 * n % 4000 for n in range(64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--moe", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16384, help="of the matrix that kernels are measured on")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    device = torch.device(options.device.removeprefix("torch:"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, standing in"
    link = measure_copies(str(device))
    parts = [
        f"{name}; host to device {format_rate(link)} from pageable memory.",
        table(["type", "product of one token", "of the card's memory"], list(kernels(device, options.rows))),
    ]
    header = ["model", "on the device", "link a token", "decode tok/s", "prefill tok/s", "link reached", "experts hit"]
    rows = []
    for model, budgets in ((options.dense, dense_budgets), (options.moe, moe_budgets)):
        if model is not None:
            rows += [decode(model, options, share, vram, link) for share, vram in budgets(model, options.device)]
    if rows:
        parts.append(table(header, rows))
    body = "\n\n".join(parts)
    print(f"{body}\n\n{write('device', body, folder=options.results)}")


def seconds(work: Callable[[], object], device: torch.device, repetitions: int = 20) -> float:
    """Of one run, when many follow each other."""
    work()
    wait(device)
    start = time.perf_counter()
    for _ in range(repetitions):
        work()
    wait(device)
    return (time.perf_counter() - start) / repetitions


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels(device: torch.device, rows: int, columns: int = 8192) -> Iterator[list[str]]:
    """The bandwidth of a product of one token, by type."""
    source = torch.zeros(256 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory = 2 * source.numel() / seconds(lambda: target.copy_(source), device)
    products, x = products_for(device), torch.randn(1, columns, device=device)
    for name in TYPES:
        element = element_type(name)
        nbytes = rows * element.row_bytes(columns)
        raw = torch.randint(0, 100, (nbytes,), dtype=torch.uint8, device=device)

        def work(raw: torch.Tensor = raw, name: str = name) -> torch.Tensor:
            return products.product(x, raw, element_type(name), (rows, columns))

        found = nbytes / seconds(work, device, 20 if device.type == "cuda" else 1)
        yield [name, format_rate(found), f"{found / memory:.0%}"]


def needs(model: Path, device: str) -> tuple[Plan, int, int, int]:
    """A plan, what is always on the device, and what all dense matrices and all experts take there."""
    plan = plan_model(model, device=device, ctx=1024)
    demand = plan.demand
    assert demand.device_fixed is not None
    dense = sum(block.footprint for block in demand.blocks)
    experts = sum(bank.num_experts * bank.device_bytes for bank in demand.banks)
    return plan, sum(demand.device_fixed.values()), dense, experts


def dense_budgets(model: Path, device: str) -> Iterator[tuple[str, int]]:
    _, fixed, dense, _ = needs(model, device)
    for share in DENSE_SHARES:
        yield f"{share:.0%}", fixed + int(share * dense) + MIB


def moe_budgets(model: Path, device: str) -> Iterator[tuple[str, int]]:
    _, fixed, dense, experts = needs(model, device)
    for share in EXPERT_SHARES:
        yield f"{share:.0%} of experts", fixed + dense + int(share * experts) + MIB


def decode(model: Path, options: argparse.Namespace, share: str, vram: int, link: float) -> list[str]:
    """A line: one load, a run to warm up, and one that counts."""
    try:
        plan_model(model, device=options.device, vram=vram, ctx=1024)
    except BudgetError as error:
        vram, share = error.minimum_bytes, f"{share}, raised"
    with offload.load(model, device=options.device, vram=vram, ctx=1024) as engine:
        settings = {"temperature": 0, "ignore_eos": True, "max_tokens": options.tokens}
        engine.generate(PROMPT, **settings)
        done = engine.generate([5, *PROMPT], **settings)
        plan = engine.plan
    moved = plan.link_bytes * done.timings.decode_tps
    hits = "-" if done.experts is None else f"{done.experts.hit_rate:.0%}"
    return [
        model.stem, f"{share} ({format_size(vram)})", format_size(plan.link_bytes), f"{done.timings.decode_tps:.3g}",
        f"{done.timings.prefill_tps:.3g}", f"{moved / link:.0%}" if plan.link_bytes else "-", hits,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
