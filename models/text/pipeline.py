"""The steps of a Hugging Face tokenizer, judged before any text goes through them. Knows no files but by name.

A normalizer may replace a letter by a hundred, and the next one each of those by a hundred more: nothing in the library
bounds what a few steps make of a short text. So what each can multiply is taken from its description, and the product is
bounded here. A template around the text may repeat it, or add as many tokens as the file has room to list.

Two looks are taken. The file's own JSON is judged before the library reads it, for the library asks for memory by numbers
that it finds there. What the steps do is judged by what the library has understood: that is what runs.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Library

from offload.errors import CheckpointError
from offload.models.checkpoint.reader import one_line, quote
from offload.models.text.bounds import TextBound
from offload.models.text.pieces import PieceKind

MAX_GROWTH: Final = 256  # no tokenizer in use comes near it: "▁" for " " is 3, an NFKC table 33
MAX_ADDED: Final = 1024
MAX_ENTRIES: Final = 10_000  # of lists and objects in one part, where the longest in use have a hundred
MAX_MARKS: Final = 6_000_000  # commas and opening brackets of a file; the largest in use have 2.4 million
_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_INNER: Final = ("normalizers", "pretokenizers", "processors", "decoders")
_SHRINKING: Final = 4  # of bytes, at the most: a composed character, or an ASCII letter for a mathematical one
_SHRINKING_STEPS: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})


def steps_of(part: Any) -> Iterator[dict[str, Any]]:
    """Every step of a normalizer, pre-tokenizer, post-processor or decoder, sequences opened."""
    return _opened(None if part is None else json.loads(part.__getstate__()))


def _opened(part: Any) -> Iterator[Any]:
    pending = [] if part is None else [part]
    while pending:
        step = pending.pop()
        yield step
        if isinstance(step, dict):
            for key in _INNER:
                inner = step.get(key) or []
                pending += inner if isinstance(inner, list) else [inner]


def check_description(path: Path, data: bytes) -> None:
    """Refuse, by the text of a tokenizer.json alone, what the library must not even read.

    Raises:
        CheckpointError: it is no JSON object, has too much in it, or names the part that is wrong.
    """
    marks = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if marks > MAX_MARKS:  # each may become an object of a hundred bytes
        raise CheckpointError(
            f"{path}: {marks} commas and brackets, at most {MAX_MARKS} are read; get the file again", path=str(path)
        )
    try:
        # the structure of JSON is ASCII, and read as UTF-8 one rare character would make all others four bytes wide
        description = json.loads(data.decode("latin-1"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a tokenizer ({one_line(str(error))}); get the file again", path=str(path)
        ) from None
    if not isinstance(description, dict):
        raise CheckpointError(f"{path}: not a tokenizer (no JSON object); get the file again", path=str(path))
    for name in _PARTS:
        _check_part(path, name, description.get(name))


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The library reads every value of a repeated key, so none may hide behind the last. Vocabularies hide nothing."""
    items = dict(pairs)
    if len(items) < len(pairs) and not all(isinstance(value, int) for value in items.values()):
        raise ValueError("a key appears twice in one object")
    return items


def _check_part(path: Path, name: str, part: Any) -> None:
    entries, pending = 0, [part]
    while pending:
        value = pending.pop()
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        entries += len(inner)
        if entries > MAX_ENTRIES:
            raise _wrong(path, name, f"more than {MAX_ENTRIES} entries, refused")
        pending += inner
    for step in _opened(part):
        if not isinstance(step, dict):  # the library takes a list of a step's values, too, and guesses which step it is
            raise _wrong(path, name, f"a step is {quote(step)}, expected an object")
        if "precompiled_charsmap" in step and not _is_table(step["precompiled_charsmap"]):
            raise _wrong(path, name, "precompiled_charsmap is no table, or says that it is longer than it is")


def check_pipeline(path: Path, library: Library) -> None:
    """Refuse steps that make much of little, and one that cannot take any.

    Raises:
        CheckpointError: names the part of the file.
    """
    for name in _PARTS:
        growth, added, times = 1, 0, 1
        for step in steps_of(getattr(library, name)):
            growth *= _growth(step)
            added += len(step.get("prepend") or "")
            if step["type"] == "TemplateProcessing":
                repeats, tokens = _template(step)
                times, added = times * repeats, added + tokens
            if times > 1:
                raise _wrong(path, name, "it repeats the text, refused")
            if growth > MAX_GROWTH or added > MAX_ADDED:
                raise _wrong(
                    path, name, f"it can make a text more than {MAX_GROWTH} times, or by {MAX_ADDED}, longer, refused"
                )
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


def _template(step: dict[str, Any]) -> tuple[int, int]:
    """How often a template has the text, and how many tokens beside it. Texts are never tokenized in pairs."""
    known = step["special_tokens"]
    names = [piece["SpecialToken"]["id"] for piece in step["single"] if "SpecialToken" in piece]
    return len(step["single"]) - len(names), sum(len(known[name]["ids"]) for name in names if name in known)


def _is_table(charsmap: object) -> bool:
    """Whether the trie of a sentencepiece table ends within it: the library makes room for it before it looks."""
    if not isinstance(charsmap, str):
        return False
    try:
        data = base64.b64decode(charsmap, validate=True)
    except ValueError:
        return False
    return len(data) >= 4 and int.from_bytes(data[:4], "little") <= len(data) - 4


def _longest_replacement(charsmap: object) -> int:
    """sentencepiece's table: the size of a trie, the trie, and every replacement ended by a NUL."""
    data = base64.b64decode(charsmap) if isinstance(charsmap, str) else b""
    start = 4 + int.from_bytes(data[:4], "little")
    return max(1, *(len(text) for text in data[start:].split(b"\0")))


def _wrong(path: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name}: {what}; get the file again", path=str(path))
