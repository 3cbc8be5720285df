"""The steps of a Hugging Face tokenizer, judged before any text goes through them. Knows no files but by name.

A normalizer may replace a letter by a hundred, and the next one each of those by a hundred more: nothing in the library
bounds what a few steps make of a short text. So what each can multiply is taken from its description, and the product is
bounded here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Library

from offload.errors import CheckpointError
from offload.models.text.bounds import TextBound
from offload.models.text.pieces import PieceKind

MAX_GROWTH: Final = 256  # no tokenizer in use comes near it: "▁" for " " is 3, an NFKC table 33
MAX_ADDED: Final = 1024
_INNER: Final = ("normalizers", "pretokenizers", "decoders")
_SHRINKING: Final = 4  # of bytes, at the most: a composed character, or an ASCII letter for a mathematical one
_SHRINKING_STEPS: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})


def steps_of(part: Any) -> Iterator[dict[str, Any]]:
    """Every step of a normalizer, pre-tokenizer or decoder, sequences opened."""
    pending = [] if part is None else [json.loads(part.__getstate__())]
    while pending:
        step = pending.pop()
        yield step
        pending += [inner for key in _INNER for inner in step.get(key) or ()]


def check_pipeline(path: Path, library: Library) -> None:
    """Refuse steps that make much of little, and one that cannot take any.

    Raises:
        CheckpointError: names the part of the file.
    """
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        growth, added = 1, 0
        for step in steps_of(getattr(library, name)):
            growth *= _growth(step)
            added += len(step.get("prepend") or "")
            if growth > MAX_GROWTH or added > MAX_ADDED:
                raise _wrong(path, name, f"it can make a text more than {MAX_GROWTH} times as long, refused")
            if step["type"] == "FixedLength" and not step.get("length"):
                raise _wrong(path, name, "FixedLength has a length of 0")


def text_bound(library: Library, kind: PieceKind) -> TextBound:
    """How much text one token can stand for; nothing bounds it where characters may be dropped or left unknown."""
    steps = list(steps_of(library.normalizer))
    splits = list(steps_of(library.pre_tokenizer))
    lossless = kind == "byte_level" or getattr(library.model, "byte_fallback", False)
    keeps = all(_keeps(step) for step in steps) and all(step.get("behavior") != "Removed" for step in splits)
    if not (lossless and keeps) or any(step["type"].startswith("Whitespace") for step in splits):
        return TextBound(None)
    added = library.get_added_tokens_decoder().values()
    longest = max((len(piece.encode()) for piece in library.get_vocab()), default=1)
    composed = any(step["type"] in _SHRINKING_STEPS for step in steps)
    # in UTF-8 a token is spelled with at least as many bytes as it stands for
    return TextBound(
        max(1, longest) * (_SHRINKING if composed else 1), any(token.lstrip or token.rstrip for token in added)
    )


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a step of a normalizer leaves no byte out, but for those of `_SHRINKING_STEPS`."""
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and len(pattern.encode()) <= len(step["content"].encode())
    return step["type"] in {"Sequence", "Prepend", "ByteLevel", *_SHRINKING_STEPS}


def _growth(step: dict[str, Any]) -> int:
    """How many bytes a step can make of one, rounded up."""
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        size = len(step["content"].encode())
        # a regular expression can match nothing, between any two characters
        return max(1, -(-size // len(pattern.encode()))) if pattern else size + 1
    if step["type"] == "Precompiled":
        return _longest_replacement(step.get("precompiled_charsmap"))
    return 2 if step["type"] == "ByteLevel" else 1


def _longest_replacement(charsmap: object) -> int:
    """sentencepiece's table: the size of a trie, the trie, and every replacement ended by a NUL."""
    data = base64.b64decode(charsmap) if isinstance(charsmap, str) else b""
    start = 4 + int.from_bytes(data[:4], "little")
    return max(1, *(len(text) for text in data[start:].split(b"\0")))


def _wrong(path: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name}: {what}; get the file again", path=str(path))
