"""Text as it grows: first in a loop, then from asyncio, where leaving the loop cancels the rest.

python examples/stream.py [MODEL]
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

import offload
from offload.cli.models import demo_model


async def first_sentence(engine: offload.Engine, prompt: str) -> str:
    """Reads up to the first full stop and lets the engine go."""
    text = ""
    async with aclosing(engine.astream(prompt, max_tokens=64, temperature=0)) as chunks:
        async for chunk in chunks:
            text += chunk.text
            if "." in text:
                break
    return text


def main(model: Path) -> None:
    with offload.load(model, ctx=1024) as engine:
        for chunk in engine.stream("Once upon a time", max_tokens=32, temperature=0):
            print(chunk.text, end="", flush=True)
        print()
        print(asyncio.run(first_sentence(engine, "The ocean is")))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model())
