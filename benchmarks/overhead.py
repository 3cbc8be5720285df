"""What a decoded token spends outside kernels and waits, from the trace that `offload run --trace` writes.

    python benchmarks/overhead.py /tmp/bench/dense-8b.gguf --ram none --ram 3800M --ram 2500M

From the first kernel of the second pass (the first one is the prompt) to the last kernel of all: sampling, detokenization
and everything else between two kernels counts as overhead, unless the token was waiting for a block.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from harness.peers import drop_page_cache
from harness.results import ROOT, table, write

HEADER: Final = ["--ram", "tokens", "token", "kernels", "waits", "overhead", "share"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", action="append", required=True, help="repeat; none for no budget")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    rows = [[ram, *cells(trace(options.model, ram, options.tokens))] for ram in options.ram]
    body = f"Decoding with `{options.model.name}`: where the time of a token goes.\n\n{table(HEADER, rows)}"
    print(f"{body}\n\n{write(f'overhead_{options.model.stem}', body, folder=options.results)}")


def trace(model: Path, ram: str, tokens: int) -> list[dict[str, Any]]:
    """The events of one run of the command, as a user would start it."""
    drop_page_cache()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        command = [sys.executable, "-c", "from offload.cli import start; start()", "run", str(model)]
        command += ["-p", "Hello", "-n", str(tokens), "--temperature", "0", "--ctx", "1024", "--quiet"]
        command += ["--trace", str(path), *([] if ram == "none" else ["--ram", ram])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        return events


def cells(events: list[dict[str, Any]]) -> list[str]:
    """One line of the table."""
    kernels, waits = lane(events, "compute"), lane(events, "wait")
    last = kernels[-1]["name"]
    ends = [number for number, event in enumerate(kernels) if event["name"] == last]
    decoded = kernels[ends[0] + 1 :]
    start, end = decoded[0]["ts"], decoded[-1]["ts"] + decoded[-1]["dur"]
    kernels_us = sum(event["dur"] for event in decoded)
    waits_us = sum(event["dur"] for event in waits if start <= event["ts"] <= end)
    token_us = (end - start) / (len(ends) - 1)
    other_us = token_us - (kernels_us + waits_us) / (len(ends) - 1)
    times = [token_us, kernels_us / (len(ends) - 1), waits_us / (len(ends) - 1), other_us]
    return [str(len(ends) - 1), *(f"{time / 1000:.2f} ms" for time in times), f"{other_us / token_us:.1%}"]


def lane(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The spans of one lane in order of time."""
    return sorted((event for event in events if event.get("cat") == name), key=lambda event: float(event["ts"]))


if __name__ == "__main__":
    main()
