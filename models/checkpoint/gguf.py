"""GGUF v2 and v3, whole or split into parts (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    magic version | counts | key-values | tensor infos | padding | tensor data, each tensor at a multiple of the alignment

Reads headers and checks that every tensor lies inside its file. Reads no tensor data and knows no architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

from offload.blocks import Extent
from offload.elements import BY_GGML_ID, ElementType
from offload.errors import CheckpointError
from offload.models.checkpoint.base import Checkpoint, TensorInfo
from offload.models.checkpoint.gguf_metadata import U32, Purse, read_metadata, read_name
from offload.models.checkpoint.merge import merge_tensors
from offload.models.checkpoint.reader import DAMAGED, HeaderReader, fingerprint, is_name, is_regular_file, quote
from offload.units import MIB, align_up

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_HEADER_LIMIT_BYTES: Final = 32 * MIB  # the largest vocabularies of 2026 need 16
_DEFAULT_ALIGNMENT: Final = 32
_MAX_ALIGNMENT: Final = MIB
_MAX_DIMS: Final = 4
_SHAPES: Final = tuple(Struct(f"<{num_dims}Q") for num_dims in range(1, _MAX_DIMS + 1))
_TENSOR_INFO_BYTES: Final = 8 + 1 + 4 + 8 + 4 + 8  # the shortest that can be: one-letter name, one dimension
_TENSOR_COST: Final = 640  # bytes of a TensorInfo, its extent, its shape and its place in a dict
_COUNTS: Final = Struct("<QQ")
_TYPE_AND_OFFSET: Final = Struct("<IQ")
_SPLIT_NAME: Final = re.compile(r"(?P<prefix>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFPart:
    """One parsed file. `digest` covers its header and its size."""

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    digest: bytes


class SplitName(NamedTuple):
    """A file name of the form `prefix-00002-of-00005.gguf`; `number` counts from 1."""

    prefix: str
    number: int
    num_parts: int

    def part(self, number: int) -> str:
        """File name of another part."""
        return f"{self.prefix}-{number:05d}-of-{self.num_parts:05d}.gguf"


def split_name(path: Path) -> SplitName | None:
    """What the name of a part says, or None for a file that is no part of a split."""
    match = _SPLIT_NAME.fullmatch(path.name)
    return None if match is None else SplitName(match["prefix"], int(match["number"]), int(match["count"]))


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file, or in the split of which `path` is any part.

    Raises:
        CheckpointError: a file is missing, malformed, truncated or lies about itself; parts do not belong together.
    """
    name = split_name(path)
    paths = [path] if name is None else _part_paths(path, name)
    parts = [read_gguf(part) for part in paths]
    for number, part in enumerate(parts):
        _check_split(part, number, len(parts))
    tensors = _merge(parts)
    architecture = parts[0].metadata.get("general.architecture")
    if not architecture:
        raise CheckpointError(f"{paths[0]}: general.architecture is missing; not a model file", path=str(paths[0]))
    if not isinstance(architecture, str) or not is_name(architecture):
        message = f"{paths[0]}: general.architecture is {quote(architecture)}, expected a name"
        raise CheckpointError(message, path=str(paths[0]))
    return Checkpoint(
        path=paths[0],
        format="gguf",
        files=tuple(part.path for part in parts if part.tensors),
        architecture=architecture,
        metadata=parts[0].metadata,
        tensors=tensors,
        fingerprint=fingerprint(part.digest for part in parts),
    )


def read_gguf(path: Path) -> GGUFPart:
    """Parse one file, without regard to a split it may be part of.

    Raises:
        CheckpointError: the file is malformed, truncated or lies about itself.
    """
    with HeaderReader(path, limit_bytes=_HEADER_LIMIT_BYTES) as reader:
        _check_version(reader)
        num_tensors, num_keys = reader.unpack(_COUNTS, "counts of tensors and key-values")
        purse = Purse(reader)
        metadata = read_metadata(reader, num_keys, purse)
        alignment = _alignment(reader, metadata)
        if num_tensors * _TENSOR_INFO_BYTES > reader.remaining:
            raise reader.error(f"{num_tensors} tensors cannot fit in the {reader.remaining} bytes left; {DAMAGED}")
        infos: dict[str, TensorInfo] = {}
        for index in range(num_tensors):
            info = _read_tensor_info(reader, index, alignment)
            purse.spend(_TENSOR_COST + 4 * len(info.name), f"tensor {index}")
            if info.name in infos:
                raise reader.error(f"tensor {quote(info.name)} appears twice; {DAMAGED}", tensor=info.name)
            infos[info.name] = info
        data_start = align_up(reader.position, alignment)
        tensors = {name: _place(reader, info, data_start) for name, info in infos.items()}
        _check_overlap(reader, tensors)
        return GGUFPart(path=path, metadata=metadata, tensors=tensors, digest=reader.finish(keep=reader.position))


def _check_version(reader: HeaderReader) -> None:
    magic = reader.take(4, "magic")
    if magic != MAGIC:
        raise reader.error(f"starts with {quote(magic)}, a GGUF file starts with {MAGIC!r}; {DAMAGED}")
    (version,) = reader.unpack(U32, "version")
    if version in (value << 24 for value in _VERSIONS):
        raise reader.error("is a big-endian GGUF; convert the model again for little-endian machines")
    if version not in _VERSIONS:
        raise reader.error(f"is GGUF version {version}, versions 2 and 3 can be read; convert the model again")


def _alignment(reader: HeaderReader, metadata: Mapping[str, object]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(value) is not int or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise reader.error(f"general.alignment is {quote(value)}, expected a power of two up to {_MAX_ALIGNMENT}")
    return value


def _read_tensor_info(reader: HeaderReader, index: int, alignment: int) -> TensorInfo:
    """The next tensor info; its extent is still relative to the start of the data."""
    name = read_name(reader, f"tensor {index}")
    what = f"tensor {quote(name)}"
    (num_dims,) = reader.unpack(U32, f"{what}: number of dimensions")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise reader.error(f"{what}: {num_dims} dimensions, expected 1 to {_MAX_DIMS}; {DAMAGED}", tensor=name)
    shape = reader.unpack(_SHAPES[num_dims - 1], f"{what}: shape")[::-1]
    code, offset = reader.unpack(_TYPE_AND_OFFSET, f"{what}: type and offset")
    if code not in BY_GGML_ID:
        raise reader.error(f"{what}: element type {code} is not one that ggml computes", tensor=name)
    if offset % alignment:
        raise reader.error(f"{what}: offset {offset} is no multiple of the alignment {alignment}", tensor=name)
    nbytes = _nbytes(reader, name, what, BY_GGML_ID[code], shape)
    extent = Extent(path=reader.path, offset=offset, nbytes=nbytes)
    return TensorInfo(name=name, element=BY_GGML_ID[code], shape=shape, extent=extent)


def _nbytes(reader: HeaderReader, name: str, what: str, element: ElementType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, at most those of the file."""
    if min(shape) < 1:
        raise reader.error(f"{what}: shape {shape} has an empty dimension; {DAMAGED}", tensor=name)
    if shape[-1] % element.block_elements:
        raise reader.error(
            f"{what}: rows of {shape[-1]} elements, {element} stores {element.block_elements} at a time; {DAMAGED}",
            tensor=name,
        )
    nbytes = prod(shape[:-1]) * element.row_bytes(shape[-1])
    if nbytes > reader.size:
        raise reader.error(
            f"{what}: {element} of shape {shape} needs {nbytes} bytes, the whole file has {reader.size}; {DAMAGED}",
            tensor=name,
        )
    return nbytes


def _place(reader: HeaderReader, info: TensorInfo, data_start: int) -> TensorInfo:
    """The tensor with its extent counted from the start of the file, which must hold all of it."""
    extent = replace(info.extent, offset=data_start + info.extent.offset)
    if extent.end > reader.size:
        raise reader.error(
            f"tensor {quote(info.name)}: bytes {extent.offset} to {extent.end}, the file has {reader.size}; {DAMAGED}",
            tensor=info.name,
        )
    return replace(info, extent=extent)


def _check_overlap(reader: HeaderReader, tensors: Mapping[str, TensorInfo]) -> None:
    end, owner = 0, ""
    for info in sorted(tensors.values(), key=lambda tensor: tensor.extent.offset):
        if info.extent.offset < end:
            raise reader.error(
                f"tensor {quote(info.name)}: starts at byte {info.extent.offset}, {quote(owner)} ends at {end}; "
                f"tensors overlap, {DAMAGED}",
                tensor=info.name,
            )
        end, owner = info.extent.end, info.name


def _part_paths(path: Path, name: SplitName) -> list[Path]:
    if not 1 <= name.number <= name.num_parts:
        raise CheckpointError(f"{path}: the name says part {name.number} of {name.num_parts}", path=str(path))
    paths = []
    for number in range(1, name.num_parts + 1):
        part = path.with_name(name.part(number))
        if not is_regular_file(part):
            message = f"{part}: part {number} of {name.num_parts} is missing; put all parts in one folder"
            raise CheckpointError(message, path=str(part))
        paths.append(part)
    return paths


def _check_split(part: GGUFPart, number: int, count: int) -> None:
    """`number` counts from 0, as `split.no` does. A file alone need not mention that it is no split."""
    said = part.metadata.get("split.no", 0 if count == 1 else None), part.metadata.get("split.count", count == 1)
    alone = count == 1 and said[1] in (0, 1)
    if said != (number, count) and not alone:
        message = (
            f"{part.path}: split.no {quote(said[0])} of split.count {quote(said[1])}, the file names say {number} of "
            f"{count}; give the parts the names they had, prefix-00001-of-0000N.gguf"
        )
        raise CheckpointError(message, path=str(part.path))


def _merge(parts: list[GGUFPart]) -> dict[str, TensorInfo]:
    tensors = merge_tensors((part.path, part.tensors) for part in parts)
    path, expected = parts[0].path, parts[0].metadata.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and expected != len(tensors):
        raise CheckpointError(f"{path}: split.tensors.count says {expected}, parts hold {len(tensors)}", path=str(path))
    return tensors
