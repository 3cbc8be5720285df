"""Room for llama.cpp's regular expressions, which recurse once a character. Knows what a split may match, not what it means.

Most pre-tokenizers have a splitter of their own there. The others run on `std::regex`, whose matcher needs some 320 bytes
of stack for each character of the longest match (measured with libstdc++, x86-64); past its end the process dies. So a text
with long runs is split on a thread with a stack for `MAX_RUN` characters, three times what was measured, and longer runs
are refused.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Final, TypeVar

from offload.errors import UnsupportedError, UsageError
from offload.units import MIB

MAX_RUN: Final = 65_536
STACK_BYTES: Final = 64 * MIB
_SHORT_RUN: Final = 256  # fits the smallest stack a thread can have anywhere
# llama.cpp splits these by hand; of `std::regex` they use single characters at most
_SPLIT_BY_HAND: Final = """
a.x-4.0 chatglm-bpe codeshell command-r dbrx deepseek-r1-qwen exaone exaone4 f2llmv2 falcon-h1 falcon3 gemma4 gigachat glm4
glm5 gpt-2 granite-docling grok-2 hunyuan jais jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano
kimi-k2 kormo lfm2 llama-bpe llama-v3 llama3 megrez mellum mellum2 midm-2.0 minerva-7b modern-bert mpt olmo phi-2 pixtral
qwen2 qwen35 refact roberta-bpe smaug-bpe smollm solar-open stablelm2 starcoder trillion
"""
_WITHOUT_REGEX: Final = frozenset(_SPLIT_BY_HAND.split())
# one match may be a whole text; the time grows with the square of a number's digits
_NOT_BOUNDED: Final = ("exaone-moe", "superbpe")
# C++ calls fewer characters whitespace than Python does, so each run is taken by the wider of the two readings
_RUNS: Final = (re.compile(r"[^ \t\n\v\f\r]{2,}"), re.compile(r"\s{2,}"))

_T = TypeVar("_T")


def needs_stack(path: Path, metadata: Mapping[str, object]) -> bool:
    """Whether llama.cpp splits the texts of this vocabulary by regular expressions.

    Raises:
        UnsupportedError: by some for which no bound on runs bounds stack and time.
    """
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return False
    name = metadata.get("tokenizer.ggml.pre")
    if name in _NOT_BOUNDED:
        raise UnsupportedError(
            f"{path.name}: tokenizer.ggml.pre: {name} is not supported, no supported architecture has it"
        )
    return not (isinstance(name, str) and name in _WITHOUT_REGEX)


def call_with_stack(call: Callable[[], _T], text: str) -> _T:
    """`call()`, which is to tokenize `text`, with the stack that takes.

    Raises:
        UsageError: more than `MAX_RUN` characters without a change between whitespace and anything else.
    """
    run = sum(max((len(match[0]) for match in pattern.finditer(text)), default=1) for pattern in _RUNS)
    if run > MAX_RUN:
        raise UsageError(
            f"text: a run of {run} characters without a space (or of spaces), this vocabulary's splitter takes at most "
            f"{MAX_RUN}; break it up"
        )
    return call() if run <= _SHORT_RUN else _on_a_thread(call)


def _on_a_thread(call: Callable[[], _T]) -> _T:
    future: Future[_T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, name="offload-tokenize", daemon=True)
    usual = threading.stack_size(STACK_BYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(usual)
    try:
        thread.join()
    finally:
        thread.join()  # even when interrupted: nobody may free the vocabulary under it
    return future.result()
