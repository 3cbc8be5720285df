"""A conversation of two turns. The second turn reuses the keys and values of the first.

python examples/chat.py [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

import offload
from offload.cli.models import demo_model


def main(model: Path) -> None:
    messages = [{"role": "system", "content": "You answer in one short sentence."}]
    with offload.load(model, ctx=1024) as engine:
        for question in ("What is the capital of France?", "And of Italy?"):
            messages.append({"role": "user", "content": question})
            answer = engine.chat(messages, max_tokens=32, temperature=0)
            messages.append({"role": "assistant", "content": answer.text})
            print(f"> {question}\n{answer.text}")
            print(f"  ({answer.cached_tokens} of {answer.prompt_tokens} prompt tokens were in the cache)")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model())
