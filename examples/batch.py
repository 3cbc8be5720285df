"""Many prompts from a file, answers appended to another as they are ready, from asyncio: a stopped run keeps what it has.

python examples/batch.py PROMPTS ANSWERS [MODEL]     one prompt a line; answers are JSON, one a line
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import aiofiles

import offload
from offload.cli.models import demo_model


async def answer_all(engine: offload.Engine, prompts: Path, answers: Path) -> int:
    """Prompts queue up at the engine while the event loop stays free for the files; returns how many were answered."""
    count = 0
    async with aiofiles.open(prompts, encoding="utf-8") as lines, aiofiles.open(answers, "a", encoding="utf-8") as out:
        async for line in lines:
            if prompt := line.strip():
                text = "".join([chunk.text async for chunk in engine.astream(prompt, max_tokens=24, temperature=0)])
                await out.write(json.dumps({"prompt": prompt, "text": text}) + "\n")
                await out.flush()
                count += 1
    return count


def main(prompts: Path, answers: Path, model: Path) -> None:
    with offload.load(model, ctx=1024) as engine:
        print(asyncio.run(answer_all(engine, prompts, answers)), "answers in", answers)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else demo_model())
