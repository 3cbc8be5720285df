"""The same bits: the demo model beside llama.cpp, and every architecture at five budgets.

    python benchmarks/exactness.py
    python benchmarks/exactness.py --model /tmp/bench/dense-8b.gguf      # also a model of real size

Random tiny checkpoints stand for the architectures; their budgets are shares of the way from the least to everything. Where
there are experts, each budget comes with another policy of who goes, and with reading ahead or without.
Exits 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import llama_cpp
import numpy as np
from harness.demo import demo_path
from harness.results import ROOT, table, write

import offload
from offload.demand import Demand
from offload.engine import Engine
from offload.plan import Plan
from offload.planning import full_budget, make_plan, minimum_budget
from offload.units import format_size

sys.path.insert(0, str(ROOT / "tests"))
from support.checkpoints import FAMILIES, tiny_checkpoint

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees Celsius because",
)
SHARES = (0.0, 0.3, 0.6, 0.8, 1.0)
WAYS = (("off", "lru"), ("on", "lfu"), ("on", "lrfu-64"), ("on", "density"), ("auto", "auto"))  # prefetch and policy
TRAINED = ROOT / "tests" / "assets" / "trained_moe" / "stdlib-olmoe-Q8_0.gguf"
GREEDY_TOKENS = 64


def beside_llama_cpp(model: Path) -> Iterator[tuple[list[str], bool]]:
    """A line for each prompt: our tokens and the logits of every step against llama.cpp's on the same file."""
    peer = llama_cpp.Llama(str(model), n_ctx=512, n_threads=2, n_threads_batch=2, flash_attn=True, verbose=False)
    with offload.load(model, ram="minimum", ctx=512, threads=2) as engine:
        for prompt in PROMPTS:
            ids = engine.tokenize(prompt)
            ours = engine.generate(ids, max_tokens=GREEDY_TOKENS, temperature=0, ignore_eos=True).tokens
            theirs, their_logits = _greedy(peer, ids)
            our_logits = np.stack([engine.logits([*ids, *ours[:step]])[-1] for step in range(0, GREEDY_TOKENS, 16)])
            difference = float(np.abs(our_logits - their_logits[::16]).max())
            equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
            row = [repr(prompt), f"{equal} of {GREEDY_TOKENS}", f"{difference:.2g}", engine.detokenize(ours)[:48]]
            yield [cell.replace("\n", " ").replace("|", "/") for cell in row], equal == GREEDY_TOKENS
    peer.close()


def _greedy(peer: llama_cpp.Llama, ids: list[int]) -> tuple[list[int], np.ndarray]:
    peer.reset()
    peer.eval(ids)
    tokens, logits = [], []
    for _ in range(GREEDY_TOKENS):
        address = ctypes.cast(peer._ctx.get_logits(), ctypes.POINTER(ctypes.c_float))
        logits.append(np.ctypeslib.as_array(address, shape=(peer.n_vocab(),)).copy())
        tokens.append(int(logits[-1].argmax()))
        peer.eval(tokens[-1:])
    return tokens, np.stack(logits)


def at_share(share: float) -> Callable[[Demand, int, int | None], Plan]:
    """A planner that takes the budget at `share` of the way from the least to everything, whatever it is given."""

    def plan(demand: Demand, _: int, device: int | None = None) -> Plan:
        least, full = minimum_budget(demand), full_budget(demand)
        return make_plan(demand, int(least + share * max(0, full - least)), device)

    return plan


def over_budgets(name: str, path: Path, ctx: int, prompt_tokens: int, tokens: int) -> tuple[list[str], bool]:
    """One line: whether logits and greedy tokens are the same at every share."""
    prompt = [int(token) for token in np.random.default_rng(0).integers(0, 90, prompt_tokens)]
    streamed, answers, logits, guesses = [], [], [], 0
    for share, (prefetch, policy) in zip(SHARES, WAYS, strict=True):
        options = {"ctx": ctx, "prefetch": prefetch, "expert_policy": policy}
        with patch("offload.opening.make_plan", at_share(share)), offload.load(path, **options) as engine:
            streamed.append(engine.plan.streamed_bytes + engine.plan.bank_bytes_on_disk)
            answers.append(_answer(engine, prompt, tokens))
            logits.append(engine.logits(prompt))
            use = engine.statistics().experts
            guesses += 0 if use is None else use.fetched_ahead
    same_tokens = all(answer == answers[0] for answer in answers)
    same_logits = all(np.array_equal(values, logits[0]) for values in logits)
    spread = len(set(streamed)) >= len(SHARES) - 1 and streamed[-1] == 0
    sizes = " / ".join(format_size(nbytes) for nbytes in streamed)
    cells = [name, sizes, str(guesses), str(same_logits), str(same_tokens)]
    return cells, same_tokens and same_logits and spread


def _answer(engine: Engine, prompt: list[int], tokens: int) -> tuple[int, ...]:
    return engine.generate(prompt, max_tokens=tokens, temperature=0, ignore_eos=True).tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a model of real size; repeat")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()

    demo = demo_path()
    peer = list(beside_llama_cpp(demo))
    budgets = [over_budgets("demo (llama, Q4_1)", demo, 512, 300, 32)]
    with tempfile.TemporaryDirectory() as folder:
        tiny = {family: tiny_checkpoint(family, Path(folder) / family) for family in FAMILIES}
        budgets += [over_budgets(f"{family}, tiny", path, 64, 40, 16) for family, path in tiny.items()]
    budgets.append(over_budgets("trained mixture (olmoe, Q8_0)", TRAINED, 512, 300, 64))
    budgets += [over_budgets(path.name, path, 1024, 300, 8) for path in options.model]

    body = f"""Greedy text and logits of `{demo.name}` at the minimum budget beside llama.cpp, all resident.
The difference is the largest of any logit of every 16th step.

{table(["prompt", "equal tokens", "largest difference", "text"], [row for row, _ in peer])}

The same bits at {", ".join(f"{share:.0%}" for share in SHARES)} of the way from the least budget to everything.

{table(["model", "not in memory", "read ahead", "logits equal", "tokens equal"], [row for row, _ in budgets])}"""
    print(f"{body}\n\n{write('exactness', body, folder=options.results)}")
    sys.exit(0 if all(fine for _, fine in [*peer, *budgets]) else 1)


if __name__ == "__main__":
    main()
