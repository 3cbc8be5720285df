"""The same tokens at every budget: with all the memory there is, and with the least that works.

python examples/budget.py [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

import offload
from offload.cli.models import demo_model
from offload.units import format_size


def main(model: Path) -> None:
    answers = set()
    for ram in (None, "minimum"):
        with offload.load(model, ram=ram, ctx=512) as engine:
            answer = engine.generate("The capital of France is", max_tokens=16, temperature=0)
            plan = engine.plan
        answers.add(answer.tokens)
        print(
            f"ram={ram}: {format_size(plan.pinned_bytes)} pinned, {format_size(plan.streamed_bytes)} streamed for each token"
        )
        print(f"  {answer.text!r} at {answer.timings.decode_tps:.1f} tokens/s")
    assert len(answers) == 1, "a budget changes the speed, never the tokens"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model())
