"""The tokenizer inside a GGUF file, run by llama.cpp. Knows nothing of tensors; no weights are loaded.

llama.cpp ends the process on a vocabulary that breaks its assumptions, so `check_vocabulary` refuses those before it sees
the file. Only the two vocabulary kinds of the supported architectures are let through.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from offload.errors import CheckpointError, ClosedError, UnsupportedError, UsageError
from offload.models.text.llama import llama

KINDS: Final = ("gpt2", "llama")  # byte-level BPE and sentencepiece
MAX_TEXT_BYTES: Final = 64 * 1024 * 1024
MAX_VOCABULARY: Final = 4 * 1024 * 1024
SPECIAL_NAMES: Final = ("bos", "eos", "unknown", "separator", "padding")
TEMPLATE_NAMES: Final = {"unknown": "unk", "separator": "sep", "padding": "pad"}


class GGUFTokenizer:
    """Tokenizer of a GGUF file. Implements `Tokenizer`; `vocab` is the llama.cpp vocabulary that the DRY sampler needs.

    Args:
        path: the .gguf file, the first one of a split.
        metadata: its key-values, already parsed and bounded.

    Raises:
        CheckpointError: the vocabulary contradicts itself.
        UnsupportedError: a kind of vocabulary that no supported architecture uses.
    """

    def __init__(self, path: Path, metadata: Mapping[str, object]) -> None:
        tokens = check_vocabulary(path, metadata)
        self._model: Any = _load_vocabulary(path)
        self.vocab: Any = llama.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama.llama_vocab_n_tokens(self.vocab))
        bos = int(llama.llama_vocab_bos(self.vocab))
        self.bos_token: int | None = bos if bos >= 0 else None
        self.eos_tokens = frozenset(t for t in range(self.vocab_size) if llama.llama_vocab_is_eog(self.vocab, t))
        template = metadata.get("tokenizer.chat_template")
        self.template: str | None = template if isinstance(template, str) and template.strip() else None
        self.special_strings: Mapping[str, str] = _special_strings(metadata, tokens)
        self._piece = ctypes.create_string_buffer(256)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        if len(data) > MAX_TEXT_BYTES:
            raise UsageError(f"text: {len(data)} bytes to tokenize, at most {MAX_TEXT_BYTES} allowed; shorten it")
        capacity = len(data) + 8  # one token a byte at the very worst, and what add_special adds
        buffer = (llama.llama_token * capacity)()
        flags = (add_special, parse_special)
        count = llama.llama_tokenize(self._open(), data, len(data), buffer, capacity, *flags)
        if count < 0:
            capacity = -count
            buffer = (llama.llama_token * capacity)()
            count = llama.llama_tokenize(self.vocab, data, len(data), buffer, capacity, *flags)
        assert 0 <= count <= capacity, count
        return list(buffer[:count])

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        vocab, size = self._open(), len(self._piece)
        length = llama.llama_token_to_piece(vocab, token, self._piece, size, 0, special)
        if length < 0:
            self._piece = ctypes.create_string_buffer(-length)
            length = llama.llama_token_to_piece(vocab, token, self._piece, -length, 0, special)
        return self._piece.raw[:length]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        known = [token for token in tokens if 0 <= token < self.vocab_size]
        ids = (llama.llama_token * len(known))(*known)
        size = 16 * len(known) + 64
        buffer = ctypes.create_string_buffer(size)
        length = llama.llama_detokenize(self._open(), ids, len(known), buffer, size, False, special)
        if length < 0:
            size = -length
            buffer = ctypes.create_string_buffer(size)
            length = llama.llama_detokenize(self.vocab, ids, len(known), buffer, size, False, special)
        return buffer.raw[:length].decode("utf-8", errors="replace")

    def close(self) -> None:
        model, self._model, self.vocab = self._model, None, None
        if model is not None:
            llama.llama_model_free(model)

    def _open(self) -> Any:
        if self.vocab is None:
            raise ClosedError("tokenizer: it is closed; load the model again")
        return self.vocab


def has_vocabulary(metadata: Mapping[str, object]) -> bool:
    """Whether a GGUF brings a tokenizer at all."""
    return metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def check_vocabulary(path: Path, metadata: Mapping[str, object]) -> Sequence[str]:
    """The token texts, once everything that llama.cpp asserts (and would abort on) is known to hold.

    Raises:
        CheckpointError: names the key that is wrong.
        UnsupportedError: a kind of vocabulary outside of `KINDS`.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise UnsupportedError(f"{path.name}: tokenizer kind {kind!r} is not supported, only {' and '.join(KINDS)}")
    tokens = _array(path, metadata, "tokenizer.ggml.tokens", str)
    if not 0 < len(tokens) <= MAX_VOCABULARY:
        raise _wrong(path, "tokenizer.ggml.tokens", f"{len(tokens)} tokens, expected 1 to {MAX_VOCABULARY}")
    distinct = set(tokens)
    if len(distinct) != len(tokens):
        raise _wrong(path, "tokenizer.ggml.tokens", f"{len(tokens)} tokens of which only {len(distinct)} differ")
    for key, kinds in (("tokenizer.ggml.scores", (int, float)), ("tokenizer.ggml.token_type", int)):
        if key in metadata and len(array := _array(path, metadata, key, kinds)) != len(tokens):
            raise _wrong(path, key, f"{len(array)} entries for {len(tokens)} tokens")
    if kind == "llama":
        _check_bytes(path, distinct)
    for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
        token = metadata.get(key, 0)
        if not isinstance(token, int) or not 0 <= token < len(tokens):
            raise _wrong(path, key, f"{token!r} is not one of {len(tokens)} tokens")
    return tokens


def _check_bytes(path: Path, distinct: set[str]) -> None:
    """A sentencepiece vocabulary falls back to bytes, each of which must then have a token."""
    missing = [b for b in range(256) if f"<0x{b:02X}>" not in distinct and not (b < 0x80 and chr(b) in distinct)]
    if missing:
        raise _wrong(
            path, "tokenizer.ggml.tokens", f"no token for byte 0x{missing[0]:02X}, {len(missing)} bytes missing"
        )


def _array(path: Path, metadata: Mapping[str, object], key: str, kind: type | tuple[type, ...]) -> Sequence[Any]:
    array = metadata.get(key)
    if isinstance(array, str | bytes) or not isinstance(array, Sequence):
        raise _wrong(path, key, "missing, or not an array")
    if not all(isinstance(entry, kind) for entry in array):
        raise _wrong(path, key, "entries of the wrong type")
    return array


def _wrong(path: Path, key: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {key}: {what}; the file is damaged, get it again", path=str(path))


def _load_vocabulary(path: Path) -> Any:
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = True
    parameters.load_mode = llama.LLAMA_LOAD_MODE_NONE  # never a mapping: a file truncated under one kills the process
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise CheckpointError(
            f"{path.name}: llama.cpp does not accept its tokenizer; get the file again", path=str(path)
        )
    return model


def _special_strings(metadata: Mapping[str, object], tokens: Sequence[str]) -> dict[str, str]:
    strings = {}
    for name in SPECIAL_NAMES:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            strings[f"{TEMPLATE_NAMES.get(name, name)}_token"] = tokens[token]
    return strings
