"""A long context with ever less memory for its KV cache: time of the prompt, decoding, what the disk gave, and the bits.

    python benchmarks/long_context.py --ctx 16384 --share 1 --share 0.5 --share 0.25 --share 0.05

The demo model. A share is of the whole cache; the rest lies on disk. What decoding reaches is its reads over the bandwidth
that the probe finds on the file of the model, in the same run. Log-probabilities of the ten likeliest tokens are compared
bit by bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.demo import demo_path
from harness.peers import drop_page_cache
from harness.results import RESULTS, table, write

import offload
from offload.engine import plan_model
from offload.results import Completion
from offload.tiers.probe import measure_disk
from offload.units import format_rate, format_size

HEADER = ("in memory", "of the cache", "prompt", "decode tok/s", "read a token", "while decoding", "same bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx", type=int, default=16384)
    parser.add_argument("--share", type=float, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    everything = plan_model(demo_path(), ctx=options.ctx, device="cpu").kv_bytes
    probe_bps, lines, first = measure_disk(demo_path()), [], None
    for share in options.share:
        drop_page_cache()
        nbytes = None if share >= 1 else int(share * everything)
        done, read = answer(options, nbytes)
        first = first or done
        same = done.tokens == first.tokens and done.logprobs == first.logprobs
        times, reached = done.timings, read * done.timings.decode_tps / probe_bps
        lines.append([
            format_size(nbytes or everything), f"{share:.0%}", f"{times.ttft_s:.1f} s", f"{times.decode_tps:.3g}",
            format_size(read), f"{reached:.0%} of {format_rate(probe_bps)}" if read else "-", "yes" if same else "NO",
        ])  # fmt: skip
        print(lines[-1], flush=True)
    body = f"Demo model, context {options.ctx}, cache of {format_size(everything)}.\n\n{table(HEADER, lines)}"
    print(f"{body}\n\n{write('long_context', body, folder=options.results)}")


def answer(options: argparse.Namespace, kv_ram: int | None) -> tuple[Completion, int]:
    """An answer behind a prompt that fills the context, and the bytes that one of its tokens reads."""
    prompt = [11 + 7 * number % 4000 for number in range(options.ctx - options.tokens - 8)]
    with offload.load(demo_path(), ctx=options.ctx, device="cpu", kv_ram=kv_ram) as engine:
        engine.generate(prompt[:8], max_tokens=4, temperature=0, ignore_eos=True)
        done = engine.generate(prompt, max_tokens=options.tokens, temperature=0, ignore_eos=True, logprobs=10)
        return done, engine.plan.demand.kv_streamed_bytes


if __name__ == "__main__":
    main()
