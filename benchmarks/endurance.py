"""Ten thousand tokens through a small cache of experts: does memory grow, and do tokens slow down?

python benchmarks/endurance.py tests/assets/trained_moe/stdlib-olmoe-Q8_0.gguf --tokens 10000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import psutil
from harness.budgets import experts_in_memory
from harness.results import ROOT, table, write

import offload
from offload.units import format_size

ANSWER_TOKENS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts in memory")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    process, rows = psutil.Process(), []
    with experts_in_memory(options.share), offload.load(options.model, ctx=ANSWER_TOKENS + 64) as engine:
        for done in range(0, options.tokens, ANSWER_TOKENS):
            start = time.perf_counter()
            prompt = [32 + (13 * place + done) % 4000 for place in range(40)]
            answer = engine.generate(prompt, max_tokens=ANSWER_TOKENS, temperature=1.0, seed=done, ignore_eos=True)
            speed = ANSWER_TOKENS / (time.perf_counter() - start)
            hits = "-" if answer.experts is None else f"{answer.experts.hit_rate:.1%}"
            rows.append([str(done + ANSWER_TOKENS), f"{speed:.1f}", hits, format_size(process.memory_info().rss)])
            print(rows[-1], flush=True)
    grid = table(["tokens", "tok/s", "experts hit", "resident set"], rows)
    body = f"`{options.model.name}`, {options.share:.0%} of the experts in memory.\n\n{grid}"
    print(f"\n{body}\n\n{write('endurance', body, folder=options.results)}")


if __name__ == "__main__":
    main()
