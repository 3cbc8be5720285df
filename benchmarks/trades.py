"""What opt-in trades cost: perplexity when light experts are skipped, or computed from half of their bits.

    python benchmarks/trades.py

On the trained mixture of experts, over two texts: what it has not learnt of Python's own library, and what the demo model
writes. Every token is computed by itself, as in an answer, with a sixth of the experts in memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from harness.budgets import experts_in_memory
from harness.results import ROOT, table, write

import offload
from offload.packing import write_pack

sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "tests"))
from support.demo import demo_model
from train_moe import WINDOW, documents

TRAINED: Final = ROOT / "tests" / "assets" / "trained_moe" / "stdlib-olmoe-Q8_0.gguf"
THRESHOLDS: Final = (0.05, 0.10, 0.15, 0.20)
SHARE: Final = 1 / 6
HEADER: Final = [
    "trade",
    "skipped",
    "half the bits",
    "read a token",
    "perplexity",
    "cost",
    "perplexity, demo's text",
    "cost",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of each text, at most")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    texts = ["".join(documents()[1]), demo_text()]
    with tempfile.TemporaryDirectory() as folder:
        side = Path(folder) / "side.gguf"
        write_pack(TRAINED, side)
        trades: dict[str, dict[str, Any]] = {"none": {}}
        trades |= {f"skip below {share:.0%}": {"skip_experts_below": share} for share in THRESHOLDS}
        trades |= {
            f"coarse below {share:.0%}": {"coarse_experts_below": share, "expert_pack": side}
            for share in (*THRESHOLDS, 1.0)
        }
        rows, exact = [], [0.0, 0.0]
        for name, settings in trades.items():
            row, likelihoods = measure(texts, options.tokens, settings)
            exact = exact if rows else likelihoods
            cells = [cell for ours, theirs in zip(likelihoods, exact, strict=True) for cell in costs(ours, theirs)]
            rows.append([name, *row, *cells])
            print(rows[-1], flush=True)
    body = f"`{TRAINED.name}`, windows of {WINDOW} tokens, a sixth of the experts in memory.\n\n{table(HEADER, rows)}"
    print(f"\n{body}\n\n{write('trades', body, folder=options.results)}")


def demo_text() -> str:
    """What the demo model writes about things that a Python programmer reads about."""
    questions = ("Explain what a Python dictionary is.", "How does a for loop work in Python?", "What is a text file?")
    with offload.load(demo_model(), ctx=1024) as engine:
        return "\n\n".join(
            engine.chat([{"role": "user", "content": question}], max_tokens=400, temperature=0).text
            for question in questions
        )


def measure(texts: list[str], count: int, settings: dict[str, Any]) -> tuple[list[str], list[float]]:
    """How many experts were skipped and coarse, bytes read, and the mean log likelihood of each text."""
    likelihoods, tokens = [], 0
    with experts_in_memory(SHARE), offload.load(TRAINED, ctx=WINDOW, **settings) as engine:
        for text in texts:
            ids = engine.tokenize(text)[:count]
            parts = [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW)]
            found = np.concatenate([engine.log_likelihood(part, one_by_one=True) for part in parts if len(part) > 1])
            likelihoods.append(float(found.mean()))
            tokens += len(ids)
        statistics = engine.statistics()
    use = statistics.experts
    assert use is not None
    all_experts = use.demanded + use.skipped
    nbytes = sum(edge.bytes for edge in statistics.io.values()) / tokens
    return [
        f"{use.skipped / all_experts:.1%}",
        f"{use.coarse / all_experts:.1%}",
        f"{nbytes / 1e3:.0f} kB",
    ], likelihoods


def costs(likelihood: float, exact: float) -> tuple[str, str]:
    """Perplexity, and by how much it is higher."""
    return f"{np.exp(-likelihood):.3f}", f"{np.exp(exact - likelihood) - 1:+.2%}"


if __name__ == "__main__":
    main()
