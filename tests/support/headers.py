"""Builds GGUF and safetensors files byte by byte, honest or not: nothing here checks anything."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
GGML_F32, GGML_Q4_0 = 0, 2


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(code: int, content: object) -> bytes:
    return string(content) if code == STRING else struct.pack(f"<{LETTERS[code]}", content)  # type: ignore[arg-type]


def key(name: str | bytes, code: int, content: object) -> bytes:
    return string(name) + struct.pack("<I", code) + value(code, content)


def array(name: str, code: int, items: Sequence[object], *, count: int | None = None) -> bytes:
    head = struct.pack("<IIQ", ARRAY, code, len(items) if count is None else count)
    return string(name) + head + b"".join(value(code, item) for item in items)


def nested(name: str, depth: int) -> bytes:
    return string(name) + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U8, 0)


def tensor(name: str | bytes, dims: Sequence[int], code: int = GGML_F32, offset: int = 0) -> bytes:
    """`dims` innermost first, as in the file."""
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + shape + struct.pack("<IQ", code, offset)


class Gguf(NamedTuple):
    """A GGUF file in pieces. Counts are those of the pieces unless given."""

    keys: tuple[bytes, ...] = (key("general.architecture", STRING, "llama"),)
    tensors: tuple[bytes, ...] = ()
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    num_keys: int | None = None
    num_tensors: int | None = None
    alignment: int = 32

    def build(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        head = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_keys)
        head += b"".join(self.keys) + b"".join(self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data


def safetensors(header: Mapping[str, object] | str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = json.dumps(header) if isinstance(header, Mapping) else header
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype: str, shape: Sequence[object], begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def tokenizer_keys(model: str) -> tuple[bytes, ...]:
    """The metadata that a llama file with a tokenizer of this model begins with."""
    return (
        key("general.architecture", STRING, "llama"),
        key("llama.context_length", U32, 128),
        key("llama.embedding_length", U32, 64),
        key("llama.block_count", U32, 1),
        key("tokenizer.ggml.model", STRING, model),
    )
