"""Checks of a GGUF's vocabulary. Pure functions of its metadata; calls no library.

llama.cpp ends the process on a vocabulary that breaks its assumptions, so whatever it asserts is asserted here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from offload.errors import CheckpointError, UnsupportedError
from offload.models.checkpoint.reader import quote

KINDS: Final = ("gpt2", "llama")  # byte-level BPE and sentencepiece
MAX_VOCABULARY: Final = 4 * 1024 * 1024
_TOKENS: Final = "tokenizer.ggml.tokens"


def check_vocabulary(path: Path, metadata: Mapping[str, object]) -> Sequence[str]:
    """The token texts, once everything that llama.cpp asserts (and would abort on) is known to hold.

    Raises:
        CheckpointError: names the key that is wrong.
        UnsupportedError: a kind of vocabulary outside of `KINDS`.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise UnsupportedError(
            f"{path.name}: tokenizer kind {quote(kind)} is not supported, only {' and '.join(KINDS)}"
        )
    tokens = _array(path, metadata, _TOKENS, str)
    if not 0 < len(tokens) <= MAX_VOCABULARY:
        raise _wrong(path, _TOKENS, f"{len(tokens)} tokens, expected 1 to {MAX_VOCABULARY}")
    known = _index_by_text(path, tokens)
    for key, kinds in (("tokenizer.ggml.scores", (int, float)), ("tokenizer.ggml.token_type", int)):
        if key in metadata and len(array := _array(path, metadata, key, kinds)) != len(tokens):
            raise _wrong(path, key, f"{len(array)} entries for {len(tokens)} tokens")
    if kind == "llama":
        _check_bytes(path, known)
    for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
        token = metadata.get(key, 0)
        if not isinstance(token, int) or not 0 <= token < len(tokens):
            raise _wrong(path, key, f"{quote(token)} is not one of {len(tokens)} tokens")
    return tokens


def _index_by_text(path: Path, tokens: Sequence[str]) -> dict[str, int]:
    """Every token's index by the text that llama.cpp will know it by: it cuts at NUL and names what is empty."""
    known: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if "\0" in token:
            raise _wrong(path, _TOKENS, f"token {index}, {quote(token)}, has a NUL in it")
        text = token or f"[EMPTY_{index}]"
        first = known.setdefault(text, index)
        if first != index:
            raise _wrong(path, _TOKENS, f"tokens {first} and {index} are both {quote(text)}")
    return known


def _check_bytes(path: Path, known: Mapping[str, int]) -> None:
    """A sentencepiece vocabulary falls back to bytes, each of which must then have a token."""
    missing = [b for b in range(256) if f"<0x{b:02X}>" not in known and not (b < 0x80 and chr(b) in known)]
    if missing:
        raise _wrong(path, _TOKENS, f"no token for byte 0x{missing[0]:02X}, {len(missing)} bytes missing")


def _array(path: Path, metadata: Mapping[str, object], key: str, kind: type | tuple[type, ...]) -> Sequence[Any]:
    array = metadata.get(key)
    if isinstance(array, str | bytes) or not isinstance(array, Sequence):
        raise _wrong(path, key, "missing, or not an array")
    if not all(isinstance(entry, kind) for entry in array):
        raise _wrong(path, key, "entries of the wrong type")
    return array


def _wrong(path: Path, key: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {key}: {what}; the file is damaged, get it again", path=str(path))
