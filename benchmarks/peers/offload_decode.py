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
    with offload.load(options.model, ram=options.memory or None, ctx=options.ctx, threads=options.threads) as engine:
        done = engine.generate(
            prompt(options, VOCAB_SIZE), max_tokens=options.tokens + 1, temperature=0, ignore_eos=True
        )
        plan, statistics = engine.plan, engine.statistics()
        middle = options.prompt_tokens + options.tokens // 2
    report(
        "offload",
        load_s=done.timings.load_s,
        prefill_tps=done.timings.prefill_tps,
        decode_tps=done.timings.decode_tps,
        tokens=list(done.tokens),
        predicted_tps=plan.predicted_tps_at(middle),
        streamed_bytes=plan.streamed_bytes_at(middle),
        io={edge: asdict(use) | {"bandwidth_bps": use.bandwidth_bps} for edge, use in done.io.items()},
        statistics={"compute_s": statistics.compute_s, "wait_s": statistics.wait_s, "other_s": statistics.other_s},
        peak_rss_bytes=done.peak_rss_bytes,
    )


if __name__ == "__main__":
    main()
