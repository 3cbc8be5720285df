"""Routing traces as files: every choice of a run in about a byte, small enough to mail, checked before it is believed.

    magic      8 bytes  OFLROUTE
    version    u32      2                                             all numbers little-endian
    header     u32 length, then JSON: the fields of `RoutingTrace` but its arrays, and the arrays' names, types, shapes and
               bytes in the file
    arrays     each zlib-compressed, in the header's order. Experts are u8 where there are at most 255 of them, else u16;
               the largest number stands for nobody
    checksum   u32      CRC-32 of all before it

A file is somebody else's: sizes are bounded by the length of the file before memory is asked for, and every number in it is
checked against what it can be.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from offload.errors import CheckpointError, StorageError
from offload.prefetch.routing import NOBODY, RoutingTrace, legible
from offload.units import GIB, format_size
from offload.writing import beside

MAGIC: Final = b"OFLROUTE"
VERSION: Final = 2
MAX_HEADER: Final = 1 << 20
MAX_NBYTES: Final = 2 * GIB  # of all arrays
MAX_RATIO: Final = 1040  # zlib cannot compress better
MAX_LAYERS: Final = 4096
MAX_EXPERTS: Final = 32767
MAX_DECISIONS: Final = 1 << 30  # tokens times experts of all layers; the optimum needs four bytes for each
_START: Final = struct.Struct("<8sII")
_ARRAYS: Final = {"choices": 3, "passes": 1, "foreseen": 4}
_SCALARS: Final = ("model", "origin", "num_experts", "fixed_bytes")
_BY_LAYER: Final = ("layers", "expert_bytes", "banks", "slot_bytes")


def write_routing(path: Path, trace: RoutingTrace) -> None:
    """Writes a trace in one step. Only an earlier trace, or an empty file, is ever replaced.

    Raises:
        StorageError: the file cannot be written, or something else is there.
    """
    check_place(path)
    data = encode(trace)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise StorageError(f"routing trace {path}: {error.strerror}; choose another place", path=str(path)) from None


def read_routing(path: Path) -> RoutingTrace:
    """Reads a trace.

    Raises:
        StorageError: the file cannot be read. CheckpointError: it is no trace, damaged, or says what cannot be.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"routing trace {path}: not a regular file; name a trace", path=str(path))
        if path.stat().st_size > MAX_NBYTES:
            raise CheckpointError(f"routing trace {path}: larger than any trace; name another file", path=str(path))
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"routing trace {path}: {error.strerror}; check the path", path=str(path)) from None
    try:
        return decode(data)
    except _Lie as lie:
        raise CheckpointError(
            f"routing trace {path}: {lie}; record it anew with `offload trace record`", path=str(path)
        ) from None


def encode(trace: RoutingTrace) -> bytes:
    """The bytes of a file."""
    arrays = {name: _packed(name, getattr(trace, name), trace.num_experts) for name in _ARRAYS}
    compressed = {name: zlib.compress(array.tobytes(), 6) for name, array in arrays.items()}
    header = {name: getattr(trace, name) for name in (*_SCALARS, *_BY_LAYER)}
    header["origin"] = legible(trace.origin)
    header["arrays"] = {
        name: {"type": array.dtype.str, "shape": array.shape, "nbytes": len(compressed[name])}
        for name, array in arrays.items()
    }
    text = json.dumps(header).encode()
    body = _START.pack(MAGIC, VERSION, len(text)) + text + b"".join(compressed.values())
    return body + struct.pack("<I", zlib.crc32(body))


def decode(data: bytes) -> RoutingTrace:
    """The trace in the bytes of a file."""
    if len(data) < _START.size + 4 or not data.startswith(MAGIC):
        raise _Lie("not a routing trace")
    _, version, length = _START.unpack_from(data)
    if version != VERSION:
        raise _Lie(f"version {version}, this program reads {VERSION}")
    if length > min(MAX_HEADER, len(data) - _START.size - 4):
        raise _Lie(f"a header of {length} bytes in a file of {len(data)}")
    if zlib.crc32(memoryview(data)[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise _Lie("damaged: its checksum does not match")
    try:
        header = json.loads(data[_START.size : _START.size + length])
        fields: dict[str, Any] = _fields(header)
        arrays: dict[str, Any] = _arrays(header["arrays"], data, _START.size + length)
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise _Lie(f"a header that makes no sense ({type(error).__name__}: {error})") from None
    return _checked(RoutingTrace(**fields, **arrays))


class _Lie(Exception):
    """What is wrong with a file."""


def _packed(name: str, array: npt.NDArray[Any], num_experts: int) -> npt.NDArray[Any]:
    if name == "passes":
        return array.astype("<i4")
    kind = np.dtype("u1" if num_experts <= 255 else "<u2")
    return np.where(array == NOBODY, np.iinfo(kind).max, array).astype(kind)


def _fields(header: Any) -> dict[str, Any]:
    fields = {name: header[name] for name in (*_SCALARS, *_BY_LAYER)}
    for name in ("model", "origin"):
        if not isinstance(fields[name], str) or not fields[name].isprintable():
            raise _Lie(f"{name} is no text")
    for name in _BY_LAYER:
        if not isinstance(fields[name], list) or not 1 <= len(fields[name]) <= MAX_LAYERS:
            raise _Lie(f"{name} is no list of 1 to {MAX_LAYERS} numbers")
        if len(fields[name]) != len(fields["layers"]):
            raise _Lie(f"{len(fields['layers'])} layers, but {len(fields[name])} {name}")
        fields[name] = tuple(_whole(name, value, 1 << 50) for value in fields[name])
    _whole("num_experts", fields["num_experts"], MAX_EXPERTS)
    _whole("fixed_bytes", fields["fixed_bytes"], 1 << 50)
    if min(fields["expert_bytes"]) == 0 or min(fields["slot_bytes"]) == 0 or fields["num_experts"] == 0:
        raise _Lie("experts of no size")
    if list(fields["layers"]) != sorted(set(fields["layers"])):
        raise _Lie("layers out of order")
    return fields


def _whole(name: str, value: Any, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise _Lie(f"{name}={value!r} is no number from 0 to {most}")
    return value


def _arrays(described: Any, data: bytes, start: int) -> dict[str, npt.NDArray[Any]]:
    if list(described) != list(_ARRAYS):
        raise _Lie(f"arrays {list(described)}, expected {list(_ARRAYS)}")
    result, total = {}, 0
    for name, dimensions in _ARRAYS.items():
        shape = tuple(_whole(name, size, 1 << 40) for size in described[name]["shape"])
        kind = described[name]["type"]
        allowed = ("<i4",) if name == "passes" else ("|u1", "<u2")
        if kind not in allowed or len(shape) != dimensions:
            raise _Lie(f"{name}: {kind} of {len(shape)} dimensions")
        nbytes = _whole(name, described[name]["nbytes"], len(data) - 4 - start)
        expected = np.dtype(kind).itemsize
        for size in shape:
            expected *= size
        total += expected
        if expected > nbytes * MAX_RATIO + MAX_RATIO or total > MAX_NBYTES:
            raise _Lie(f"{name}: {format_size(expected)} in {nbytes} bytes of the file")
        result[name] = _inflated(name, data[start : start + nbytes], expected, kind).reshape(shape)
        start += nbytes
    if start != len(data) - 4:
        raise _Lie(f"{len(data) - 4 - start} bytes behind the last array")
    return result


def _inflated(name: str, part: bytes, expected: int, kind: str) -> npt.NDArray[Any]:
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(part, expected + 1)
    except zlib.error as error:
        raise _Lie(f"{name}: {error}") from None
    if len(raw) != expected or not inflater.eof or inflater.unused_data:
        raise _Lie(f"{name}: its bytes are not {expected} when unpacked")
    array = np.frombuffer(raw, dtype=kind)
    if kind == "<i4":
        return array
    nobody = np.iinfo(array.dtype).max
    ids = array.astype(np.int32)
    ids[array == nobody] = NOBODY
    if len(ids) and ids.max() > MAX_EXPERTS:
        raise _Lie(f"{name}: expert {ids.max()}")
    return ids.astype(np.int16)


def _checked(trace: RoutingTrace) -> RoutingTrace:
    """
    Raises:
        _Lie: the arrays do not fit each other, or what the header says.
    """
    tokens, layers, used = trace.choices.shape
    if layers != len(trace.layers) or not 1 <= used <= trace.num_experts:
        raise _Lie(
            f"choices of {layers} layers and {used} experts; {len(trace.layers)} and {trace.num_experts} expected"
        )
    for name in ("choices", "foreseen"):
        ids = getattr(trace, name)
        if ids.size and ids.max() >= trace.num_experts:
            raise _Lie(f"{name}: expert {ids.max()} of {trace.num_experts}")
    ordered = np.sort(trace.choices, axis=-1)
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NOBODY)).any():
        raise _Lie("choices: an expert twice for one token")
    if ((ordered[..., 0] == NOBODY) != (ordered[..., -1] == NOBODY)).any():
        raise _Lie("choices: a token with fewer experts than others")
    if trace.passes.shape != (tokens,) or (np.diff(trace.passes) < 0).any():
        raise _Lie("passes are not one number for each token, ascending")
    tokens_foreseen, ahead, layers_foreseen, width = trace.foreseen.shape
    if max(ahead, layers_foreseen) > layers or width > trace.num_experts:
        raise _Lie(f"foreseen of shape {trace.foreseen.shape} for {layers} layers of {trace.num_experts} experts")
    if tokens_foreseen and (tokens_foreseen != tokens or layers_foreseen != layers):
        raise _Lie(f"foreseen of shape {trace.foreseen.shape}, choices of {trace.choices.shape}")
    if tokens * layers * trace.num_experts > MAX_DECISIONS:
        raise _Lie(
            f"{tokens} tokens through {layers} layers of {trace.num_experts} experts are more than can be replayed"
        )
    return trace


def check_place(path: Path) -> None:
    """Where a trace may be written: nothing is there, or an earlier trace.

    Raises:
        StorageError: something else than a trace is there.
    """
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC)) if path.is_file() else None
    except OSError as error:
        raise StorageError(f"routing trace {path}: {error.strerror}; choose another place", path=str(path)) from None
    if head not in (b"", MAGIC):
        raise StorageError(
            f"routing trace {path}: the file is there and is no earlier trace; choose another place", path=str(path)
        )
