"""The tokenizer inside a GGUF file, run by llama.cpp. Knows nothing of tensors; no weights are loaded.

llama.cpp ends the process on a vocabulary that breaks its assumptions, so `vocabulary.py` refuses those before it sees the
file, and on a text that its stack cannot hold, so `stack.py` gives it one.
"""

from __future__ import annotations

import ctypes
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
        self._needs_stack = needs_stack(path, metadata)
        self._bound = _bound(metadata, tokens)
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
        capacity = len(data) + 8  # one token a byte at the very worst, and what add_special adds
        buffer = (llama.llama_token * capacity)()
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


def _bound(metadata: Mapping[str, object], tokens: Sequence[str]) -> TextBound:
    name = str(metadata.get("general.name", "")).lower()
    # llama.cpp goes by these names, too
    strips = "phi-3" in name or "phi3" in name or "jina-v2" in str(metadata.get("tokenizer.ggml.pre", ""))
    # in UTF-8 a token is spelled with at least as many bytes as it stands for
    longest = max(len(token.encode(errors="replace")) for token in tokens)
    return TextBound(max(_EMPTY_BYTES, longest), strips)
