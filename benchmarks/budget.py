"""The promise of --ram under the kernel's eyes: a control group limited to the very budget, at three budgets.

    python benchmarks/budget.py /tmp/bench/dense-8b.gguf --ram 3800M --ram 2500M --ram 1200M

Every run must end by itself, without a kill, with its peak at or under the limit and page cache out of it.
Exits 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.peers import Outcome, run_peer
from harness.results import table, write

from offload.units import MIB, format_size, parse_size

HEADER = ["--ram = limit", "peak", "page cache", "anonymous", "kills", "limit reached", "decode tok/s", "verdict"]
CACHE_BYTES = 256 * MIB  # the libraries that a process maps are page cache too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", action="append", required=True, help="repeat for several budgets")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    rows, kept = [], True
    for text in options.ram:
        limit = parse_size(text)
        outcome = run_peer(
            "offload",
            options.model,
            limit_bytes=limit,
            prompt_tokens=options.prompt_tokens,
            tokens=options.tokens,
            ctx=options.ctx,
            timeout_s=options.timeout,
        )
        rows.append([format_size(limit), *cells(outcome, limit)])
        kept = kept and rows[-1][-1] == "kept"
        print(" | ".join(rows[-1]), flush=True)
    body = f"`{options.model.name}` with `--ram` equal to the kernel's limit.\n\n{table(HEADER, rows)}"
    print(f"\n{write(f'budget_{options.model.stem}', body, folder=options.results)}")
    sys.exit(0 if kept else 1)


def cells(outcome: Outcome, limit: int) -> list[str]:
    """The line of one budget after its first cell."""
    run = outcome.run
    sizes = [format_size(nbytes) for nbytes in (run.peak_bytes, run.peak_cache_bytes, run.peak_anonymous_bytes)]
    speed = (
        f"{outcome.figures['decode_tps']:.3g}"
        if outcome.figures
        else outcome.failure.replace("|", "/").replace("\n", " ")
    )
    return [*sizes, str(run.oom_kills), str(run.limit_hits), speed, verdict(outcome, limit)]


def verdict(outcome: Outcome, limit: int) -> str:
    """`kept`, or what broke the promise."""
    run = outcome.run
    if outcome.failure:
        return "failed"
    if run.peak_bytes > limit:
        return "above the limit"
    return "kept" if run.peak_cache_bytes <= CACHE_BYTES else "page cache"


if __name__ == "__main__":
    main()
