"""transformers with Accelerate's device map: what `--vram` has no room for lies in host memory, copied for every token.

python benchmarks/peers/accelerate_device.py folder --device cuda:0 --vram 1200000000 --prompt-tokens 64 --tokens 16

All of `--vram` is offered to weights; the KV cache and what is computed come on top, which favours the peer.
"""

from __future__ import annotations

import torch
from accelerate_disk import generate
from common import argument_parser, prompt, report, timed
from transformers import AutoModelForCausalLM

HOST_BYTES = 1 << 40  # as much as there is


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--vram", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    memory = {"cpu": HOST_BYTES} if device.type == "cpu" else {device.index or 0: options.vram, "cpu": HOST_BYTES}
    load_s, model = timed(
        lambda: AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16, device_map="auto", max_memory=memory
        ).eval()
    )
    ids = prompt(options, model.config.vocab_size)
    generate(model, ids, None, 1)  # to warm up
    prefill_s, (first, cache) = timed(lambda: generate(model, ids, None, 1))
    decode_s, (tokens, _) = timed(lambda: generate(model, first, cache, options.tokens))
    report(
        "accelerate",
        load_s=load_s,
        prefill_tps=options.prompt_tokens / prefill_s,
        decode_tps=options.tokens / decode_s,
        tokens=first + tokens,
    )


if __name__ == "__main__":
    main()
