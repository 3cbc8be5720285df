"""This project, through its public interface. Prints the peers' line of JSON and what the engine says about the run.

python benchmarks/peers/offload_decode.py model.gguf --prompt-tokens 32 --tokens 16 --memory 3984588800
"""

from __future__ import annotations

from dataclasses import asdict

from common import argument_parser, prompt, report

import offload

VOCAB_SIZE = 49152  # the demo model's vocabulary, which every synthetic model has


def main() -> None:
    options = argument_parser(__doc__).parse_args()
    memory = options.memory or None
    with offload.load(options.model, device="cpu", ram=memory, ctx=options.ctx, threads=options.threads) as engine:
        tokens, settings = prompt(options, VOCAB_SIZE), {"temperature": 0, "ignore_eos": True}
        first = done = engine.generate(tokens, max_tokens=(options.warm_up or options.tokens) + 1, **settings)
        if options.warm_up:
            done = engine.generate([*tokens, *first.tokens], max_tokens=options.tokens + 1, **settings)
        plan, statistics = engine.plan, engine.statistics()
        middle = options.prompt_tokens + options.warm_up + options.tokens // 2
        per_expert = max((bank.expert_bytes for bank in plan.demand.banks), default=0)
    report(
        "offload",
        load_s=done.timings.load_s,
        prefill_tps=first.timings.prefill_tps,
        decode_tps=done.timings.decode_tps,
        tokens=list(done.tokens if first is done else (*first.tokens, *done.tokens)),
        predicted_tps=plan.predicted_tps_at(middle),
        streamed_bytes=plan.streamed_bytes_at(middle)
        if done.experts is None
        else done.experts.misses * per_expert / len(done.tokens),
        experts=None if done.experts is None else asdict(done.experts) | {"hit_rate": done.experts.hit_rate},
        io={edge: asdict(use) | {"bandwidth_bps": use.bandwidth_bps} for edge, use in done.io.items()},
        statistics={"compute_s": statistics.compute_s, "wait_s": statistics.wait_s, "other_s": statistics.other_s},
        peak_rss_bytes=done.peak_rss_bytes,
    )


if __name__ == "__main__":
    main()
