"""What every peer agrees on: its arguments, the prompt, and the one line of JSON that it prints."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """MODEL and the sizes of the run; `memory` is the limit in bytes that the process runs under, 0 for none."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=0, help="tokens decoded before those that are timed")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def prompt(options: argparse.Namespace, vocab_size: int) -> list[int]:
    """The same random ids for every peer, special tokens (the first 17 of the demo vocabulary) left out."""
    return random.Random(options.seed).choices(range(32, vocab_size), k=options.prompt_tokens)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that `work` took, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def report(
    peer: str,
    *,
    load_s: float,
    prefill_tps: float,
    decode_tps: float,
    tokens: list[int],
    **more: Mapping[str, object] | float,
) -> None:
    """Prints the line that compare.py reads."""
    figures = {"load_s": load_s, "prefill_tps": prefill_tps, "decode_tps": decode_tps, "tokens": tokens, **more}
    print(json.dumps({"peer": peer, **figures}))
