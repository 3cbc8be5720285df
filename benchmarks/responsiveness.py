"""How long a person waits: start-up of the package and the command, and from a cancel to a free engine.

    python benchmarks/responsiveness.py /tmp/bench/dense-8b.gguf --ram 2500M

Cancels come at random moments of streamed decoding and of a long prompt; the budget should make the disk the bottleneck.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from harness.results import ROOT, table, write

import offload
from offload.engine import Engine

IMPORT = "import time; start = time.perf_counter(); import offload; print(time.perf_counter() - start)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", default="minimum")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    rows = [
        row("import offload", [import_s() for _ in range(options.trials)]),
        row("offload --help", [help_s() for _ in range(options.trials)]),
    ]
    with offload.load(options.model, ram=options.ram, ctx=1024) as engine:
        for name, prompt_tokens, moment in (
            ("cancel in decoding", 4, lambda: random.uniform(1.5, 3)),
            ("cancel in a prompt", 900, lambda: random.uniform(0.1, 3)),
        ):
            rows.append(row(name, [cancel_s(engine, prompt_tokens, moment) for _ in range(options.trials)]))
        answer = engine.generate([40, 41, 42, 43], max_tokens=2, temperature=0, ignore_eos=True)
    body = f"""`{options.model.name}` with `--ram {options.ram}`, {options.trials} trials each;
afterwards the engine gave {len(answer.tokens)} tokens.

{table(["", "median", "longest"], rows)}"""
    print(f"{body}\n\n{write(f'responsiveness_{options.model.stem}', body, folder=options.results)}")


def row(name: str, seconds: list[float]) -> list[str]:
    return [name, f"{median(seconds) * 1000:.0f} ms", f"{max(seconds) * 1000:.0f} ms"]


def import_s() -> float:
    done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout)


def help_s() -> float:
    start = time.perf_counter()
    subprocess.run([Path(sys.executable).with_name("offload"), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def cancel_s(engine: Engine, prompt_tokens: int, moment: Callable[[], float]) -> float:
    """Seconds from `cancel` until the generation has ended and the engine is free."""
    prompt = random.choices(range(100, 40_000), k=prompt_tokens)  # never the one in the cache
    stream = engine.stream(prompt, max_tokens=900 - prompt_tokens + 16, temperature=0, ignore_eos=True)
    time.sleep(moment())
    start = time.perf_counter()
    stream.close()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
