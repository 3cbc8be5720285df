"""A peer and ours, alternating, on one file, under the same memory limit, page cache dropped before each run.

    python benchmarks/compare.py llama.cpp /tmp/bench/dense-8b.gguf --limit none --limit 3800M --limit 2500M
    python benchmarks/compare.py accelerate /tmp/bench/llama-1b --limit 1800M --peer-tokens 4

Prints medians and writes a dated result file. "of disk" is the rate of our reads while any was under way, over the bandwidth
that the probe of `offload doctor` measures on the same file in the same round; "share of limit" is the bytes that a token
had to read (of experts: those that memory did not hold, and no wrong guesses), times tokens per second, over that bandwidth;
"other" is the time outside kernels and waits, over the whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from harness.peers import PEERS, Outcome, drop_page_cache, run_peer
from harness.results import table, write

from offload.tiers.probe import measure_disk
from offload.units import format_rate, format_size, parse_size

SPEEDS = ["prefill peer", "ours", "ratio", "decode peer", "ours", "**ratio**", "predicted"]
REST = ["experts hit", "guesses right", "other", "peak peer", "peak ours", "same tokens"]
HEADER = ["limit", *SPEEDS, "read rate", "of disk", "share of limit", *REST]


@dataclass(slots=True)
class Series:
    """All rounds at one limit."""

    limit_bytes: int
    peer: list[Outcome] = field(default_factory=list)
    ours: list[Outcome] = field(default_factory=list)
    disk_bps: list[float] = field(default_factory=list)

    def row(self) -> list[str]:
        """One line of the table: medians, and ratios of medians."""
        cells = [format_size(self.limit_bytes) if self.limit_bytes else "none"]
        for name in ("prefill_tps", "decode_tps"):
            theirs, ours = middle(self.peer, name), middle(self.ours, name)
            cells += [
                rate(theirs, self.peer),
                rate(ours, self.ours),
                f"{ours / theirs:.2f}x" if theirs and ours else "-",
            ]
        cells.append(rate(middle(self.ours, "predicted_tps"), self.ours))
        read = figure(self.ours, lambda run: run.figures["io"]["nvme->ram"]["bandwidth_bps"])
        disk = median(self.disk_bps)
        needed = figure(self.ours, lambda run: run.figures["streamed_bytes"] * run.figures["decode_tps"])
        cells += [format_rate(read), f"{read / disk:.0%}", f"{needed / disk:.0%}"] if read else ["-"] * 3
        cells += self.experts()
        cells.append(f"{figure(self.ours, other_share):.1%}")
        cells += [format_size(max(outcome.run.peak_bytes for outcome in side)) for side in (self.peer, self.ours)]
        return [*cells, self.agreement()]

    def experts(self) -> list[str]:
        """Hit rate, and the share of guesses that were right; or dashes where no expert came or went."""
        runs = [run for run in self.ours if run.figures and run.figures["experts"]]
        if not runs:
            return ["-", "-"]
        right = figure(
            runs, lambda run: run.figures["experts"]["used_ahead"] / max(1, run.figures["experts"]["fetched_ahead"])
        )
        return [f"{figure(runs, lambda run: run.figures['experts']['hit_rate']):.1%}", f"{right:.0%}"]

    def agreement(self) -> str:
        """How many leading tokens of the first runs are equal."""
        if not (self.peer[0].figures and self.ours[0].figures):
            return "-"
        pairs = list(zip(self.peer[0].figures["tokens"], self.ours[0].figures["tokens"], strict=False))
        equal = next((index for index, (theirs, ours) in enumerate(pairs) if theirs != ours), len(pairs))
        return f"{equal} of {len(pairs)}"


def figure(outcomes: list[Outcome], read: Callable[[Outcome], float]) -> float:
    """Median over the runs that succeeded, 0 when none did."""
    return median([read(outcome) for outcome in outcomes if outcome.figures] or [0.0])


def other_share(outcome: Outcome) -> float:
    """Time outside kernels and waits over the time of all passes."""
    seconds = outcome.figures["statistics"]
    return float(seconds["other_s"] / sum(seconds.values()))


def middle(outcomes: list[Outcome], name: str) -> float:
    return figure(outcomes, lambda outcome: outcome.figures[name])


def rate(tokens_per_second: float, outcomes: list[Outcome]) -> str:
    """`5.47`, or why there is no figure."""
    return f"{tokens_per_second:.3g}" if tokens_per_second else outcomes[0].failure.replace("|", "/").replace("\n", " ")


def main() -> None:
    options = arguments()
    weights = options.model / "model.safetensors" if options.model.is_dir() else options.model
    rows = []
    for limit in options.limit:
        series = Series(0 if limit == "none" else parse_size(limit))
        for number in range(options.rounds):
            drop_page_cache()
            series.disk_bps.append(measure_disk(weights))
            series.peer.append(measure(options.peer, series, options, options.peer_tokens))
            series.ours.append(measure("offload", series, options, options.tokens))
            print(f"{limit}, medians after round {number + 1}: {' | '.join(series.row())}", flush=True)
        rows.append(series.row())
    body = f"""{options.peer} against offload on `{options.model.name}` ({format_size(weights.stat().st_size)}).
Tokens per second, medians of {options.rounds} alternating rounds; {options.prompt_tokens} prompt tokens,
{options.tokens} decoded ({options.peer_tokens} by the peer) after {options.warm_up} to warm up.

{table(HEADER, rows)}"""
    print(f"\n{body}\n\n{write(options.name or f'{options.peer}_{options.model.stem}', body, folder=options.results)}")


def measure(peer: str, series: Series, options: argparse.Namespace, tokens: int) -> Outcome:
    return run_peer(
        peer,
        options.model,
        limit_bytes=series.limit_bytes,
        prompt_tokens=options.prompt_tokens,
        tokens=tokens,
        ctx=options.ctx,
        warm_up=options.warm_up,
        timeout_s=options.timeout,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=[name for name in PEERS if name != "offload"])
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--limit", action="append", required=True, help="of the control group, such as 3800M, or none; repeat"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=0, help="tokens decoded before those that are timed, by both")
    parser.add_argument("--peer-tokens", type=int, default=8, help="fewer, where the peer needs seconds for each")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run")
    parser.add_argument("--name", help="of the result file; default: peer and model")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
