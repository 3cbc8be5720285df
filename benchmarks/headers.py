"""How long files take to open, honest and hostile ones: the bar is a second for each, whatever the file says of itself.

    python benchmarks/headers.py

The hostile files are those of the tests, which bound their memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from harness.demo import demo_path
from harness.results import RESULTS, ROOT, table, write

from offload.errors import CheckpointError
from offload.models.checkpoint import open_checkpoint

sys.path.append(str(ROOT / "tests"))
from support import hostile
from support.headers import STRING, Gguf, array, key

TRIALS = 3
VOCABULARY = 150_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows = [("the demo model", *opening(demo_path())), *vocabulary(Path(folder))]
        small = [
            opening(hostile.write(Path(folder), suffix, data))
            for suffix, cases in ((".gguf", hostile.GGUF), (".safetensors", hostile.SAFETENSORS))
            for data, _ in cases.values()
        ]
        rows.append((f"hostile, small: the slowest of {len(small)}", *max(small)))
        for name, (suffix, data, size, _) in hostile.LARGE.items():
            rows.append((f"hostile: {name}", *opening(hostile.write(Path(folder), suffix, data, size=size))))
    lines = [[name, f"{seconds * 1000:.0f} ms", ends] for name, seconds, ends in rows]
    body = f"Each the median of {TRIALS}.\n\n{table(['', 'time', 'ends'], lines)}"
    print(f"{body}\n\n{write('headers', body, folder=options.results)}")


def vocabulary(folder: Path) -> list[tuple[str, float, str]]:
    """A vocabulary of 150,000 strings, beside the `gguf` package."""
    from gguf import GGUFReader

    path = folder / "vocabulary.gguf"
    tokens = array("tokens", STRING, [f"token{i}" for i in range(VOCABULARY)])
    path.write_bytes(Gguf(keys=(key("general.architecture", STRING, "llama"), tokens)).build())
    name = f"a vocabulary of {VOCABULARY:,}"
    return [
        (name, *opening(path)),
        (f"{name}, by the gguf package", median_s(lambda: GGUFReader(path)), "opens"),
    ]


def opening(path: Path) -> tuple[float, str]:
    """Seconds, and how it ended."""
    ends = ""

    def attempt() -> None:
        nonlocal ends
        try:
            open_checkpoint(path)
            ends = "opens"
        except CheckpointError:
            ends = "refused"

    return median_s(attempt), ends


def median_s(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


if __name__ == "__main__":
    main()
