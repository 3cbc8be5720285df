"""What smaller KV caches cost: perplexity, bytes of a token, and time of attention far into a context, by element type.

    python benchmarks/kv_types.py

Keys and values apart, on the demo model and on the trained mixture of experts, over a part of Python's own library that the
mixture has not learnt. Every token attends to keys and values as they are stored, its own included. Attention is timed as
the planner times it: its kernel alone on one thread, the fastest of many runs, in rounds that take all types in turn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

import numpy as np
from harness.demo import demo_path
from harness.results import ROOT, table, write

import offload
from offload.elements import kv_types
from offload.kernels.ggml.probe import measure_attention
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model

sys.path.insert(0, str(ROOT / "scripts"))
from train_moe import WINDOW, documents

TRAINED: Final = ROOT / "tests" / "assets" / "trained_moe" / "stdlib-olmoe-Q8_0.gguf"
PAIRS: Final = (
    ("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("q8_0", "f16"), ("f16", "q8_0"), ("q8_0", "q8_0"), ("q4_0", "f16"),
    ("f16", "q4_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"),
)  # fmt: skip
HEADER: Final = ["keys", "values", "bytes a token", "perplexity", "cost", "change of a token"]
LONG: Final = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, at most")
    parser.add_argument("--threads", type=int, help="of the perplexities")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 for none")
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    text, parts = "".join(documents()[1]), []
    for path, window in ((demo_path(), 1024), (TRAINED, WINDOW)):
        rows = list(costs(path, window, text, options.tokens, options.threads))
        parts.append(f"`{path.name}`, windows of {window} tokens.\n\n{table(HEADER, rows)}")
        print(parts[-1], flush=True)
    if options.rounds:
        what = (
            f"Attention of a token over {LONG} positions of `{demo_path().name}`, one thread, best of {options.rounds}."
        )
        parts.append(f"{what} {options.note}\n\n{table(['keys', 'values', 'attention'], speeds(options.rounds))}")
    body = "\n\n".join([f"Cost is against F32. {options.tokens} tokens of text at most.", *parts])
    print(f"\n{body}\n\n{write('kv_types', body, folder=options.results)}")


def costs(path: Path, window: int, text: str, count: int, threads: int | None) -> list[list[str]]:
    """A row for each pair of types."""
    rows, exact = [], np.empty(0, np.float32)
    for key, value in PAIRS:
        with offload.load(path, ctx=window, threads=threads, kv_type_k=key, kv_type_v=value) as engine:
            ids = engine.tokenize(text[: 16 * count])[:count]
            windows = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
            found = np.concatenate([engine.log_likelihood(part) for part in windows if len(part) > 1])
            nbytes = engine.plan.kv_bytes / window
        exact = exact if len(exact) else found
        cost, change = np.exp(exact.mean() - found.mean()) - 1, np.abs(found - exact).mean()
        rows.append([key, value, f"{nbytes:.0f}", f"{np.exp(-found.mean()):.3f}", f"{cost:+.2%}", f"{change:.4f}"])
        print(rows[-1], flush=True)
    return rows


def speeds(rounds: int) -> list[list[str]]:
    """A row for each pair of types: what attention takes of a token late in the demo model's context."""
    config = build_model(open_checkpoint(demo_path()), LONG).config
    seen: dict[tuple[str, str], list[float]] = {pair: [] for pair in PAIRS}
    for _ in range(rounds):
        for pair in PAIRS:
            seconds = measure_attention(config, kv_types(*pair), threads=1, seconds=0.3)
            seen[pair].append(1e3 * seconds * LONG * config.num_layers)
    return [[*pair, f"{min(times):.0f} ms"] for pair, times in seen.items()]


if __name__ == "__main__":
    main()
