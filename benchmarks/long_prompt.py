"""A long prompt through a small cache: each expert that a chunk touches is read at most once for a layer and chunk.

    python benchmarks/long_prompt.py /tmp/bench/moe-16b.gguf --share 0.1 --prompt-tokens 2000

A chunk is the tokens that pass through the model together. What it touches is counted from the routers' choices. Afterwards
tokens are decoded: their hit rate, beside that before the prompt, shows whether the prompt flushed what they use. How many
experts of a layer are effectively in use, by the entropy of the choices, says what kind of routing this is.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from harness.peers import drop_page_cache
from harness.results import ROOT, table, write

import offload
from offload.engine import plan_model
from offload.kernels.batch import MicroBatch
from offload.prefetch.routing import effective_experts
from offload.units import format_size

HEADER = [
    "cache",
    "chunks",
    "touched",
    "in memory",
    "touched once",
    "read",
    "read / touched",
    "hit before",
    "hit after",
    "effectively used",
]
ROUTED_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--share", type=float, default=0.1, help="of the experts in memory while the prompt is read")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=24, help="decoded before and after")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    body = f"""A prompt of {options.prompt_tokens} tokens through `{options.model.name}`.

{table(HEADER, [measure(options)])}"""
    print(f"{body}\n\n{write(f'long_prompt_{options.model.stem}', body, folder=options.results)}")


def budget(path: Path, share: float, ctx: int) -> int:
    """The `ram` at which memory holds this share of the experts while a prompt is read, and nothing is on loan."""
    need = plan_model(path, ram="minimum", ctx=ctx).demand
    dense = sum(need.fixed.values()) + sum(block.footprint for block in need.blocks)
    return dense + sum(round(share * bank.num_experts) * bank.slot_bytes for bank in need.banks)


def measure(options: argparse.Namespace) -> list[str]:
    ctx = options.prompt_tokens + 4 * options.tokens
    drop_page_cache()
    with offload.load(options.model, ram=budget(options.model, options.share, ctx), ctx=ctx) as engine:
        runner, touched = engine._runner, []
        assert runner is not None

        def observe(batches: list[MicroBatch]) -> None:
            for layer in runner.opened.model.experts:
                chosen = [np.unique(runner.backend.routed(place, layer)) for place in range(len(batches))]
                touched.append(len(np.unique(np.concatenate(chosen))))

        def decode() -> float:
            done = engine.generate([11, 12, 13], max_tokens=options.tokens, temperature=0, ignore_eos=True)
            return 1.0 if done.experts is None else done.experts.hit_rate

        decode()
        before = decode()
        generator = random.Random(0)
        prompt = [generator.randrange(32, 4000) for _ in range(options.prompt_tokens)]
        runner.scheduler.observer = observe
        done = engine.generate(prompt, max_tokens=1, temperature=0)
        runner.scheduler.observer = None
        after = decode()
        trace = engine.record_routing(prompt[:ROUTED_TOKENS])
        chunks = -(-options.prompt_tokens // engine.plan.prefill_tokens_per_pass)
        expert_bytes = engine.plan.demand.banks[0].expert_bytes
        held = sum(engine.plan.bank_slots_at(options.prompt_tokens, prompt=True))
        share = held / sum(bank.num_experts for bank in engine.plan.demand.banks)
    assert done.experts is not None
    read, once = sum(use.bytes for use in done.io.values()), sum(touched) * expert_bytes
    return [
        f"{share:.0%}", str(chunks), str(sum(touched)), str(done.experts.hits), format_size(once), format_size(read),
        f"{read / once:.3f}", f"{before:.0%}", f"{after:.0%}",
        f"{effective_experts(trace):.1f} of {trace.num_experts}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
