"""The tokenizer inside a GGUF file, run by llama.cpp. Knows nothing of tensors; no weights are loaded.

llama.cpp ends the process on a vocabulary that breaks its assumptions, so `vocabulary.py` refuses those before it sees the
file, and on a text that its stack cannot hold, so `stack.py` gives it one.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from offload.errors import CheckpointError, ClosedError
from offload.models.text.bounds import TextBound
from offload.models.text.llama import llama
from offload.models.text.stack import call_with_stack, needs_stack
from offload.models.text.vocabulary import check_vocabulary

SPECIAL_NAMES: Final = ("bos", "eos", "unknown", "separator", "padding")
TEMPLATE_NAMES: Final = {"unknown": "unk", "separator": "sep", "padding": "pad"}
_EMPTY_BYTES: Final = len("[EMPTY_4194304]")  # what llama.cpp calls a token without a text
_PIECE_BYTES: Final = 256  # longer tokens take a second call
_Piece: Final = ctypes.c_char * _PIECE_BYTES


class _Vocabulary:
    """llama.cpp's vocabulary, freed when nobody holds this object any more.

    The interpreter's lock is free while llama.cpp works, so `close` may come in the middle of a call of another thread.
    Each call therefore holds the vocabulary that it began with: Python's own count of references is the count of users,
    and no call waits for another.
    """

    def __init__(self, path: Path) -> None:
        model = _load_vocabulary(path)
        self._free = weakref.finalize(self, llama.llama_model_free, model)
        self._free.atexit = False  # the process gives its memory back, and a call may still be running
        self.pointer: Any = llama.llama_model_get_vocab(model)


class GGUFTokenizer:
    """Tokenizer of a GGUF file, for any number of threads at a time. Implements `Tokenizer`.

    Args:
        path: the .gguf file, the first one of a split.
        metadata: its key-values, already parsed and bounded.

    Raises:
        CheckpointError: the vocabulary contradicts itself.
        UnsupportedError: a kind of vocabulary that no supported architecture uses.
    """

    def __init__(self, path: Path, metadata: Mapping[str, object]) -> None:
        tokens = check_vocabulary(path, metadata)
        self._needs_stack = needs_stack(path, metadata)
        self._bound = _bound(metadata, tokens)
        self._vocabulary: _Vocabulary | None = _Vocabulary(path)
        vocab = self._vocabulary.pointer
        self.vocab_size = int(llama.llama_vocab_n_tokens(vocab))
        bos = int(llama.llama_vocab_bos(vocab))
        self.bos_token: int | None = bos if bos >= 0 else None
        self.eos_tokens = frozenset(t for t in range(self.vocab_size) if llama.llama_vocab_is_eog(vocab, t))
        template = metadata.get("tokenizer.chat_template")
        self.template: str | None = template if isinstance(template, str) and template.strip() else None
        self.special_strings: Mapping[str, str] = _special_strings(metadata, tokens)

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary, which the DRY sampler needs, or None once closed. For the thread that closes."""
        vocabulary = self._vocabulary
        return None if vocabulary is None else vocabulary.pointer

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True, limit: int | None = None
    ) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        self._bound.check(data, limit)
        flags = (add_special, parse_special)
        if self._needs_stack:
            return call_with_stack(lambda: self._encode(data, *flags), text)
        return self._encode(data, *flags)

    def _encode(self, data: bytes, *flags: bool) -> list[int]:
        vocabulary = self._open()
        capacity = len(data) + 8  # one token a byte at the very worst, and what add_special adds
        buffer = (llama.llama_token * capacity)()
        count = llama.llama_tokenize(vocabulary.pointer, data, len(data), buffer, capacity, *flags)
        if count < 0:
            capacity = -count
            buffer = (llama.llama_token * capacity)()
            count = llama.llama_tokenize(vocabulary.pointer, data, len(data), buffer, capacity, *flags)
        assert 0 <= count <= capacity, count
        return list(buffer[:count])

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        vocabulary, piece = self._open(), _Piece()
        length = llama.llama_token_to_piece(vocabulary.pointer, token, piece, _PIECE_BYTES, 0, special)
        if length < 0:
            size = -length
            piece = ctypes.create_string_buffer(size)
            length = llama.llama_token_to_piece(vocabulary.pointer, token, piece, size, 0, special)
        return piece.raw[:length]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        known = [token for token in tokens if 0 <= token < self.vocab_size]
        vocabulary = self._open()
        ids = (llama.llama_token * len(known))(*known)
        size = 16 * len(known) + 64
        buffer = ctypes.create_string_buffer(size)
        length = llama.llama_detokenize(vocabulary.pointer, ids, len(known), buffer, size, False, special)
        if length < 0:
            size = -length
            buffer = ctypes.create_string_buffer(size)
            length = llama.llama_detokenize(vocabulary.pointer, ids, len(known), buffer, size, False, special)
        return buffer.raw[:length].decode("utf-8", errors="replace")

    def close(self) -> None:
        self._vocabulary = None

    def _open(self) -> _Vocabulary:
        vocabulary = self._vocabulary
        if vocabulary is None:
            raise ClosedError("tokenizer: it is closed; load the model again")
        return vocabulary


def has_vocabulary(metadata: Mapping[str, object]) -> bool:
    """Whether a GGUF brings a tokenizer at all."""
    return metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def _load_vocabulary(path: Path) -> Any:
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = True
    parameters.load_mode = llama.LLAMA_LOAD_MODE_NONE  # never a mapping: a file truncated under one kills the process
    model = llama.llama_model_load_from_file(os.fsencode(path), parameters)
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


def _bound(metadata: Mapping[str, object], tokens: Sequence[str]) -> TextBound:
    name = str(metadata.get("general.name", "")).lower()
    # llama.cpp goes by these names, too
    strips = "phi-3" in name or "phi3" in name or "jina-v2" in str(metadata.get("tokenizer.ggml.pre", ""))
    # in UTF-8 a token is spelled with at least as many bytes as it stands for
    longest = max(len(token.encode(errors="replace")) for token in tokens)
    return TextBound(max(_EMPTY_BYTES, longest), strips)
