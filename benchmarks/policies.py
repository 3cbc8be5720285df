"""What policies and predictors are worth: replays of a trained model's routing, of synthetic ones, and decoding for real.

    python benchmarks/policies.py                                      replays, and decoding with the trained model
    python benchmarks/policies.py --decode /tmp/bench/moe-16b.gguf     and decoding with another

The trained model is tests/assets/trained_moe; its text is what it has not learnt of Python's own library (see
scripts/train_moe.py). Every window of 256 tokens is a text of its own, as long as those that the model was trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Final

from harness.budgets import experts_in_memory
from harness.peers import drop_page_cache
from harness.results import ROOT, table, write

import offload
from offload.prefetch.locality import segment_cache_hit_rate, segment_routing_performance
from offload.prefetch.policies import DEFAULT_EVICTION, EVICTION
from offload.prefetch.prediction import PREDICTORS
from offload.prefetch.replay import recall, replay
from offload.prefetch.routing import RoutingTrace, effective_experts
from offload.prefetch.synthetic import drifting, skewed, uniform

sys.path.insert(0, str(ROOT / "scripts"))
from train_moe import WINDOW, documents

TRAINED: Final = ROOT / "tests" / "assets" / "trained_moe" / "stdlib-olmoe-Q8_0.gguf"
SHARES: Final = (0.10, 0.25, 0.50, 0.75)
WARM_UP: Final = 512
WIDTHS: Final = (4, 6, 8)
PROMPT_TOKENS: Final = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the trained model's text")
    parser.add_argument("--decode", type=Path, action="append", default=[], help="a model to decode with; repeat")
    parser.add_argument("--decoded", type=int, default=48, help="tokens of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()

    trained, likelihood = record(options.tokens)
    shape = {"tokens": options.tokens, "layers": len(trained.layers), "num_experts": trained.num_experts}
    made = [make(**shape, num_used=trained.num_used) for make in (uniform, skewed, drifting)]
    parts = [
        f"The trained mixture on {trained.num_tokens} tokens that it has not learnt: {-likelihood:.2f} nats per token.",
        *(
            hits(name, trace)
            for name, trace in zip(("trained", "uniform", "skewed", "drifting"), (trained, *made), strict=True)
        ),
        predictors(trained),
        *(decoding(path, options.decoded, options.rounds) for path in (TRAINED, *options.decode)),
    ]
    body = "\n\n".join(parts)
    print(f"{body}\n\n{write('policies', body, folder=options.results)}")


def record(count: int) -> tuple[RoutingTrace, float]:
    """The trained model's routing, and its mean log likelihood, on held-out text."""
    with offload.load(TRAINED, ctx=WINDOW) as engine:
        tokens = engine.tokenize("".join(documents()[1]))[:count]
        windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]
        traces = [engine.record_routing(window) for window in windows]
        likelihoods = [engine.log_likelihood(window).mean() for window in windows]
    return RoutingTrace.joined(traces), float(sum(likelihoods) / len(likelihoods))


def hits(name: str, trace: RoutingTrace) -> str:
    """Hit rates by policy and cache size, and what the default leaves to the optimum."""
    rows = []
    for policy, make in {**EVICTION, "belady": None}.items():
        rates = [replay(trace, trace.share(share), make, warm_up=WARM_UP).hit_rate for share in SHARES]
        label = f"**{policy}** (default)" if policy == DEFAULT_EVICTION else policy
        rows.append([label, *(f"{rate:.1%}" for rate in rates)])
    title = (
        f"### {name}\n\n{effective_experts(trace):.1f} of {trace.num_experts} experts effectively in use, "
        f"{trace.num_used} per token and layer; SRP {segment_routing_performance(trace):.2f}, "
        f"SCH {segment_cache_hit_rate(trace):.2f}. Hit rate when memory holds so much of the experts:"
    )
    return f"{title}\n\n{table(['policy', *(f'{share:.0%}' for share in SHARES)], rows)}"


def predictors(trace: RoutingTrace) -> str:
    """Recall, and precision where it is another figure, of what each predictor names."""
    rows = []
    for ahead in range(1, trace.lookahead + 1):
        for name, make in PREDICTORS.items():
            found = [
                recall(trace, make(len(trace.layers), trace.num_experts), ahead, width, WARM_UP) for width in WIDTHS
            ]
            cells = [f"{hit:.1%} / {right:.1%}" for hit, right in found]
            rows.append([str(ahead), name, *cells])
    header = ["layers ahead", "predictor", *(f"{width} named" for width in WIDTHS)]
    return f"### Predictors, trained\n\nRecall / precision; perfect and chance are controls.\n\n{table(header, rows)}"


def decoding(path: Path, tokens: int, rounds: int) -> str:
    """Tokens per second at each cache size, with and without reading ahead, alternating."""
    rows = []
    for share in SHARES:
        speeds: dict[str, list[float]] = {"off": [], "on": []}
        notes: dict[str, str] = {}
        for _ in range(rounds):
            for prefetch in speeds:
                drop_page_cache()
                speed, notes[prefetch] = decode(path, share, prefetch, tokens)
                speeds[prefetch].append(speed)
        off, on = median(speeds["off"]), median(speeds["on"])
        rows.append([f"{share:.0%}", f"{off:.2f}", f"{on:.2f}", f"{on / off:.2f}x", notes["off"], notes["on"]])
    header = ["experts in memory", "off, tok/s", "on, tok/s", "ratio", "off", "on"]
    title = f"### Reading ahead, `{path.name}`\n\nMedians of {rounds} alternating rounds of {tokens} tokens."
    return f"{title}\n\n{table(header, rows)}"


def decode(path: Path, share: float, prefetch: str, tokens: int) -> tuple[float, str]:
    """Speed of one run after as many tokens to warm up, and what became of the experts."""
    with experts_in_memory(share), offload.load(path, ctx=1024, prefetch=prefetch) as engine:
        prompt = [32 + 7 * place % 4000 for place in range(PROMPT_TOKENS)]
        settings = {"temperature": 0, "ignore_eos": True}
        warm = engine.generate(prompt, max_tokens=tokens, **settings)
        done = engine.generate([*prompt, *warm.tokens], max_tokens=tokens + 1, **settings)
        held = sum(engine.plan.bank_slots_at(len(prompt) + 2 * tokens)) / sum(
            b.num_experts for b in engine.plan.demand.banks
        )
    use = done.experts
    if use is None:
        return done.timings.decode_tps, "all in memory"
    useful = use.used_ahead / use.fetched_ahead if use.fetched_ahead else 0.0
    note = f"{held:.0%} held, {use.hit_rate:.0%} hit"
    return done.timings.decode_tps, note + (f", {useful:.0%} of guesses right" if use.fetched_ahead else "")


if __name__ == "__main__":
    main()
