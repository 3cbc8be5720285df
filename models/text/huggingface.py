"""The tokenizer of a Hugging Face folder, run by the `tokenizers` library. Runs no code from the folder.

tokenizer.json            the tokenizer itself
tokenizer_config.json     names of the special tokens, chat template (older folders)
special_tokens_map.json   names of the special tokens (older folders)
generation_config.json    ids that end a generation
chat_template.jinja       chat template (newer folders; wins)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

from offload.errors import CheckpointError, StorageError, UnsupportedError
from offload.models.checkpoint.reader import one_line, quote
from offload.models.text.pieces import PieceKind, piece_bytes
from offload.models.text.pipeline import check_description, check_pipeline, steps_of, text_bound

MAX_TOKENIZER_BYTES: Final = 128 * 1024 * 1024  # the largest in use have 33 MB
MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024

_T = TypeVar("_T")


class HuggingFaceTokenizer:
    """Tokenizer of a folder that has a tokenizer.json. Implements `Tokenizer`.

    Args:
        folder: the checkpoint's folder.
        config: its parsed config.json, which may name the ids that end a generation.

    Raises:
        CheckpointError: a file is no JSON, too large, or not what it should be.
        UnsupportedError: tokens that cannot be mapped to bytes (word pieces).
    """

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        self._path = folder / "tokenizer.json"
        self._library = _load_library(self._path)
        self._library.no_truncation()
        self._library.no_padding()
        self._lock = threading.Lock()  # encode_special_tokens is a property of the tokenizer, not of the call
        self._added = {
            token: (a.content, bool(a.special)) for token, a in self._library.get_added_tokens_decoder().items()
        }
        self.vocab_size = max([self._library.get_vocab_size(), *(token + 1 for token in self._added)])
        self._kind = _piece_kind(folder, self._library)
        self._bound = text_bound(self._library, self._kind)
        named, settings_path = folder / "special_tokens_map.json", folder / "tokenizer_config.json"
        settings = _read_json(settings_path)
        strings = {**_special_strings(named, _read_json(named)), **_special_strings(settings_path, settings)}
        self.special_strings: Mapping[str, str] = strings
        self.bos_token: int | None = self._id(self.special_strings.get("bos_token"))
        ends = {*_end_ids(config), *_end_ids(_read_json(folder / "generation_config.json"))}
        ends.add(-1 if (eos := self._id(self.special_strings.get("eos_token"))) is None else eos)
        self.eos_tokens = frozenset(token for token in ends if 0 <= token < self.vocab_size)
        self.template: str | None = _read_template(folder / "chat_template.jinja") or _template_of(
            settings_path, settings.get("chat_template")
        )

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True, limit: int | None = None
    ) -> list[int]:
        clean = text.encode("utf-8", errors="replace")
        self._bound.check(clean, limit)
        with self._lock:
            self._library.encode_special_tokens = not parse_special
            encoding = _guarded(
                lambda: self._library.encode(clean.decode(), add_special_tokens=add_special),
                self._path,
                "model or pre_tokenizer: this text cannot be encoded",
            )
        ids: list[int] = encoding.ids
        return ids

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        if token in self._added:
            content, is_special = self._added[token]
            return content.encode() if special or not is_special else b""
        piece = self._library.id_to_token(token) if token >= 0 else None
        return b"" if piece is None else piece_bytes(piece, self._kind)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        known = [token for token in tokens if 0 <= token < self.vocab_size]
        text: str = _guarded(
            lambda: self._library.decode(known, skip_special_tokens=not special),
            self._path,
            "decoder: these tokens cannot be decoded",
        )
        return text

    def close(self) -> None:
        """Nothing is held but memory that Python frees."""

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self._library.token_to_id(text)


def _load_library(path: Path) -> Library:
    data = _read(path, MAX_TOKENIZER_BYTES)
    check_description(path, data)
    library = _guarded(lambda: Library.from_buffer(data), path, "not a tokenizer")
    check_pipeline(path, library)
    if isinstance(library.model, BPE):
        library.model.dropout = None  # leaves merges out at random, which training wants and an answer does not
    return library


def _guarded(call: Callable[[], _T], path: Path, problem: str) -> _T:
    """The library reports damage as plain Exception, and some of it by a Rust panic, which is no Exception at all."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise CheckpointError(
            f"{path}: {problem} ({one_line(str(error))}); get the file again", path=str(path)
        ) from None


def _piece_kind(folder: Path, library: Library) -> PieceKind:
    """How the tokens spell bytes: told by the decoder, or by the pre-tokenizer where there is none."""
    parts = {step["type"] for part in (library.decoder, library.pre_tokenizer) for step in steps_of(part)}
    if "WordPiece" in parts or "BertPreTokenizer" in parts:
        raise UnsupportedError(f"{folder}: word-piece tokenizers are not supported, they belong to encoder models")
    if "ByteLevel" in parts:
        return "byte_level"
    return "sentencepiece" if parts & {"ByteFallback", "Metaspace", "Replace"} else "plain"


def _end_ids(config: Mapping[str, object]) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return [token for token in ids if isinstance(token, int) and not isinstance(token, bool)]


def _special_strings(path: Path, names: Mapping[str, object]) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}`; a value is a string or an object with `content`."""
    strings: dict[str, str] = {}
    for name, value in names.items():
        text = value.get("content") if isinstance(value, dict) else value
        if not name.endswith("_token") or not isinstance(text, str):
            continue
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise CheckpointError(
                f"{path}: {quote(name)}: {quote(text)} is no text; get the file again", path=str(path)
            )
        strings[name] = text
    return strings


def _template_of(path: Path, value: object) -> str | None:
    """A template, or the one called "default" of a list of `{"name", "template"}`."""
    if isinstance(value, list):
        named = {}
        for entry in value:
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                raise CheckpointError(
                    f"{path}: chat_template: {quote(entry)} has no name; get the file again", path=str(path)
                )
            named[name] = entry.get("template")
        value = named.get("default")
    return value if isinstance(value, str) and value.strip() else None


def _read_template(path: Path) -> str | None:
    if not path.is_file():
        return None
    return _template_of(path, _read(path, MAX_CONFIG_BYTES).decode("utf-8", errors="replace"))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; an absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not JSON ({one_line(str(error))}); get the file again", path=str(path)
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(value).__name__}", path=str(path))
    return value


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})", path=str(path), errno=error.errno) from error
    if len(data) > limit:
        raise CheckpointError(f"{path}: more than {limit} bytes, refused; get the file again", path=str(path))
    return data
