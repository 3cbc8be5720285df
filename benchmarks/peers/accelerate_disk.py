"""transformers with Accelerate's disk map: layers beyond `--memory` less a reserve are read for every token.

python benchmarks/peers/accelerate_disk.py folder --prompt-tokens 32 --tokens 4 --memory 1887436800
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from common import argument_parser, prompt, report, timed
from transformers import AutoModelForCausalLM

RESERVE_BYTES = 900 * 1024**2  # interpreter, torch, transformers, one layer on its way, activations


def load(options: argparse.Namespace, folder: str) -> Any:
    """The model in bfloat16, in memory as a whole or mapped over memory and disk."""
    torch.set_num_threads(options.threads)
    if not options.memory:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    return AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": max(options.memory - RESERVE_BYTES, 0)},
        offload_folder=folder,
    ).eval()


def generate(model: Any, tokens: list[int], cache: object, count: int) -> tuple[list[int], object]:
    """Runs `tokens`, then greedy passes until there are `count` new tokens."""
    ids, chosen = torch.tensor([tokens]), []
    with torch.inference_mode():
        while len(chosen) < count:
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            chosen.append(int(ids))
    return chosen, cache


def main() -> None:
    options = argument_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        load_s, model = timed(lambda: load(options, folder))
        ids = prompt(options, model.config.vocab_size)
        prefill_s, (warm, cache) = timed(lambda: generate(model, ids, None, 1))
        if options.warm_up:
            more, cache = generate(model, warm, cache, options.warm_up)
            warm += more
        decode_s, (tokens, _) = timed(lambda: generate(model, warm[-1:], cache, options.tokens))
    report(
        "accelerate",
        load_s=load_s,
        prefill_tps=options.prompt_tokens / prefill_s,
        decode_tps=options.tokens / decode_s,
        tokens=warm + tokens,
    )


if __name__ == "__main__":
    main()
