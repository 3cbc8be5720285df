"""llama.cpp: mmap, flash attention, greedy. Prints one line of JSON.

python benchmarks/peers/llama_cpp_decode.py model.gguf --prompt-tokens 32 --tokens 16

On some processors llama.cpp copies the weights into another layout when it loads ("repacking"), and holds the model twice.
`--no-repack` computes from the file's own layout, the only way it can run on less memory than the model has bytes.
"""

from __future__ import annotations

import argparse
import ctypes

import llama_cpp
import numpy as np
from common import argument_parser, prompt, report, timed


def without_repacking() -> None:
    """The `Llama` class has no argument for it, so the defaults that it starts from are changed."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def changed() -> llama_cpp.llama_model_params:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = changed


def decode(model: llama_cpp.Llama, tokens: list[int]) -> int:
    """Runs `tokens` and returns the most probable next one."""
    ids = (llama_cpp.llama_token * len(tokens))(*tokens)
    status = llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(ids, len(tokens)))
    assert status == 0, status
    address = ctypes.cast(llama_cpp.llama_get_logits_ith(model.ctx, -1), ctypes.POINTER(ctypes.c_float))
    logits = np.ctypeslib.as_array(address, (model.n_vocab(),))
    assert np.isfinite(logits).all()
    return int(logits.argmax())


def load(options: argparse.Namespace) -> llama_cpp.Llama:
    """The model after one pass, as llama.cpp's own tools warm up: with mmap nothing is read before it is needed."""
    model = llama_cpp.Llama(
        str(options.model),
        n_ctx=options.ctx,
        n_batch=512,
        n_ubatch=512,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        flash_attn=True,
        verbose=False,
    )
    decode(model, [0])
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    return model


def prefill(model: llama_cpp.Llama, tokens: list[int]) -> int:
    """The prompt in batches of 512."""
    batches = [tokens[start : start + 512] for start in range(0, len(tokens), 512)]
    return [decode(model, batch) for batch in batches][-1]


def generate(model: llama_cpp.Llama, first: int, count: int) -> list[int]:
    """`count` passes after the token that prefill chose."""
    tokens = [first]
    for _ in range(count):
        tokens.append(decode(model, tokens[-1:]))
    return tokens


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--no-repack", action="store_true")
    options = parser.parse_args()
    if options.no_repack:
        without_repacking()
    load_s, model = timed(lambda: load(options))
    prefill_s, first = timed(lambda: prefill(model, prompt(options, model.n_vocab())))
    warm = generate(model, first, options.warm_up)
    decode_s, tokens = timed(lambda: generate(model, warm[-1], options.tokens))
    report(
        "llama.cpp",
        load_s=load_s,
        prefill_tps=options.prompt_tokens / prefill_s,
        decode_tps=options.tokens / decode_s,
        tokens=[*warm, *tokens[1:]],
    )


if __name__ == "__main__":
    main()
