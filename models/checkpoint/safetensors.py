"""The header of a safetensors file (https://github.com/huggingface/safetensors, section Format).

    length of the header: 8 bytes | header: JSON {name: {dtype, shape, data_offsets}} | data, covered without holes

Reads no tensor data. Names and shapes are the file's own; what they mean is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

from offload.blocks import Extent
from offload.elements import BY_NAME
from offload.models.checkpoint.base import TensorInfo
from offload.models.checkpoint.json_text import MAX_TEXT_BYTES, parse_json_object
from offload.models.checkpoint.reader import DAMAGED, HeaderReader, quote
from offload.units import format_size

_LENGTH: Final = Struct("<Q")
_MAX_DIMS: Final = 8
_ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})
_METADATA: Final = "__metadata__"
_STORED: Final = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "F8_E4M3")
_PACKED: Final = ("_blocks", "_scales")
_FOREIGN_BITS: Final = (
    dict.fromkeys(("F4",), 4)
    | dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6)
    | dict.fromkeys(("BOOL", "U8", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | {"U16": 16, "U32": 32, "U64": 64, "C64": 64}
)
_BITS: Final = {name: 8 * BY_NAME[name].block_bytes for name in _STORED} | _FOREIGN_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """One parsed file.

    Attributes:
        tensors: by name, in the order of their bytes. Packed blocks and their scales (U8) are raw bytes (I8).
        skipped: names of buffers of types that no model here computes with (masks, packed integers).
        digest: covers the header and the file's size.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    skipped: frozenset[str]
    digest: bytes


class _Entry(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(path: Path) -> SafetensorsFile:
    """Parse one file.

    Raises:
        CheckpointError: the file is malformed, truncated or lies about itself, or stores a weight in a type that
            cannot be computed with.
    """
    with HeaderReader(path, limit_bytes=_LENGTH.size + MAX_TEXT_BYTES) as reader:
        (length,) = reader.unpack(_LENGTH, "length of the header")
        if length > reader.remaining:
            raise reader.error(f"header of {length} bytes, {reader.remaining} left in the file; {DAMAGED}")
        if length > MAX_TEXT_BYTES:
            raise reader.error(f"header of {format_size(length)}, at most {format_size(MAX_TEXT_BYTES)} are read")
        header = reader.take(length, "header")
        if not header.startswith(b"{"):
            raise reader.error(f"header starts with {quote(header[:1])}, expected '{{'; not a safetensors file")
        digest = reader.finish(keep=0)
        parsed = parse_json_object(header, path)
        _check_metadata(reader, parsed.pop(_METADATA, {}))
        entries = sorted((_parse_entry(reader, *item) for item in parsed.items()), key=lambda entry: entry[3:])
        _check_coverage(reader, entries)
        tensors = {entry.name: _tensor(entry, path, reader.position) for entry in entries if _is_kept(entry)}
        skipped = frozenset(_skippable(reader, entries))
        return SafetensorsFile(path=path, tensors=tensors, skipped=skipped, digest=digest)


def _check_metadata(reader: HeaderReader, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise reader.error(f"{_METADATA} is not an object of strings; {DAMAGED}")


def _parse_entry(reader: HeaderReader, name: str, entry: object) -> _Entry:
    what = f"tensor {quote(name)}"
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise reader.error(f"{what}: expected exactly dtype, shape and data_offsets; {DAMAGED}", tensor=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise reader.error(f"{what}: unknown dtype {quote(dtype)}", tensor=name)
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise reader.error(
            f"{what}: shape {quote(shape)}, expected up to {_MAX_DIMS} sizes of zero or more; {DAMAGED}", tensor=name
        )
    if not _are_counts(offsets) or len(offsets) != 2:
        raise reader.error(f"{what}: data_offsets {quote(offsets)}, expected two positions; {DAMAGED}", tensor=name)
    num_bits, stored = prod(shape) * _BITS[dtype], 8 * (offsets[1] - offsets[0])
    if num_bits != stored:
        raise reader.error(
            f"{what}: {dtype} of shape {quote(shape)} needs {-(-num_bits // 8)} bytes, "
            f"data_offsets {quote(offsets)} hold {stored // 8}; {DAMAGED}",
            tensor=name,
        )
    return _Entry(name, dtype, tuple(shape), *offsets)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(reader: HeaderReader, entries: list[_Entry]) -> None:
    """Tensors follow each other from the first data byte to the end of the file."""
    end, owner, available = 0, "the header", reader.remaining
    for name, _, _, begin, stop in entries:
        if begin != end:
            kind = "overlap" if begin < end else "leave a hole"
            raise reader.error(
                f"tensor {quote(name)}: starts at data byte {begin}, {quote(owner)} ends at {end}; "
                f"tensors {kind}, {DAMAGED}",
                tensor=name,
            )
        if stop > available:
            raise reader.error(
                f"tensor {quote(name)}: ends at data byte {stop}, the file has {available}; {DAMAGED}", tensor=name
            )
        end, owner = stop, name
    if end != available:
        raise reader.error(f"{available - end} bytes follow the last tensor, which ends at data byte {end}; {DAMAGED}")


def _tensor(entry: _Entry, path: Path, data_start: int) -> TensorInfo:
    extent = Extent(path=path, offset=data_start + entry.begin, nbytes=entry.end - entry.begin)
    element = BY_NAME["I8" if entry.dtype == "U8" else entry.dtype]
    return TensorInfo(name=entry.name, element=element, shape=entry.shape, extent=extent)


def _is_kept(entry: _Entry) -> bool:
    return entry.dtype in _STORED or (entry.dtype == "U8" and entry.name.endswith(_PACKED))


def _skippable(reader: HeaderReader, entries: Iterable[_Entry]) -> Iterable[str]:
    """Names of tensors of foreign types; a weight among them is refused."""
    for entry in entries:
        if _is_kept(entry):
            continue
        if entry.dtype[0] in "FC" or entry.name.endswith(("weight", "bias")):
            raise reader.error(
                f"tensor {quote(entry.name)}: dtype {entry.dtype} cannot be computed with; "
                "use a bfloat16 version of the model, or a GGUF",
                tensor=entry.name,
            )
        yield entry.name
