"""Side files with a model's experts in two halves of their bits, so that a coarse copy can be read for half of the bytes.

    blk.3.ffn_up_exps.high   I8 [num_experts, bytes of an expert's high planes]
    blk.3.ffn_up_exps.low    I8 [num_experts, bytes of its low planes]; high and low are the original, see `bitplanes`

A standard GGUF, written by the `gguf` library (kept by llama.cpp's authors, with the format), an expert at a time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

import numpy as np

from offload.bitplanes import plane_bytes, split
from offload.blocks import ExpertKey, Extent
from offload.errors import CheckpointError, StorageError, UsageError
from offload.models.base import Model
from offload.models.checkpoint import open_checkpoint
from offload.models.checkpoint.base import Checkpoint, TensorInfo
from offload.models.registry import build_model
from offload.units import format_size
from offload.writing import beside

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE: Final = "offload-pack"
VERSION: Final = 2
ROLES: Final = ("gate", "up", "down")
_ALIGNMENT: Final = 32
_VERSION_KEY: Final = f"{ARCHITECTURE}.version"
_MODEL_KEY: Final = f"{ARCHITECTURE}.model"
_SAMPLES_KEY: Final = f"{ARCHITECTURE}.samples"
_SAMPLE_BYTES: Final = 4096

OnProgress = Callable[[int, int], None]


class Planes(NamedTuple):
    """Where the planes of an expert's gate, up and down matrices lie."""

    high: tuple[Extent, Extent, Extent]
    low: tuple[Extent, Extent, Extent]


@dataclass(frozen=True, slots=True)
class Pack:
    """An open side file."""

    path: Path
    experts: Mapping[ExpertKey, Planes]


def write_pack(model_path: Path, output: Path, progress: OnProgress | None = None) -> int:
    """Writes the side file of a model, in one step; returns its bytes.

    Raises:
        UsageError: the model has no experts, or something is at `output`. UnsupportedError: an element type whose bits are
            not split. StorageError: no room, or a read or a write failed; nothing is left behind.
    """
    checkpoint = open_checkpoint(model_path)
    model = build_model(checkpoint, 1)
    if not model.experts:
        raise UsageError(f"{model_path}: the model has no experts, and so nothing to pack")
    if output.exists():
        raise UsageError(f"{output}: it is there already; remove it or choose another place")
    tensors = list(_tensors(model))
    _check_room(output, sum(tensor.nbytes for tensor in tensors))
    samples = _samples(model)
    try:
        with beside(output, new=True) as temporary:
            nbytes = _write(temporary, _header(temporary, checkpoint, samples, tensors), tensors, progress)
            if open_checkpoint(model_path).fingerprint != checkpoint.fingerprint or _samples(model) != samples:
                raise StorageError(
                    f"{model_path}: it changed while it was read; nothing was written: pack it again",
                    path=str(model_path),
                )
    except OSError as error:
        raise StorageError(
            f"pack {output}: {error.strerror}; nothing was written: choose another place with --output",
            path=str(output),
        ) from None
    return nbytes


def open_pack(path: Path, checkpoint: Checkpoint, model: Model) -> Pack:
    """Opens the side file of this very model.

    Raises:
        CheckpointError: not a side file, damaged, or of another model.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; `offload pack` makes the side file of a model", path=str(path))
    pack = open_checkpoint(path)
    if pack.architecture != ARCHITECTURE:
        raise CheckpointError(f"{path}: not a side file; `offload pack` makes one", path=str(path))
    if pack.metadata.get(_VERSION_KEY) != VERSION:
        raise CheckpointError(f"{path}: of another version; pack the model again", path=str(path))
    if pack.metadata.get(_MODEL_KEY) != checkpoint.fingerprint or pack.metadata.get(_SAMPLES_KEY) != _samples(model):
        raise CheckpointError(f"{path}: the side file of another model; pack this one", path=str(path))
    extents: dict[ExpertKey, list[tuple[Extent, Extent]]] = {}
    for name, layer, matrices in _named(model):
        for half, place in (("high", 0), ("low", 1)):
            tensor = pack.tensors.get(f"{name}.{half}")
            expected = (len(matrices), _plane_nbytes(matrices[0])[place])
            if tensor is None or tensor.shape != expected:
                raise CheckpointError(f"{path}: {name}.{half} is missing or not {expected}; pack again", path=str(path))
        high, low = (pack.tensors[f"{name}.{half}"] for half in ("high", "low"))
        for expert in range(len(matrices)):
            extents.setdefault(ExpertKey(layer, expert), []).append((_row(high, expert), _row(low, expert)))
    return Pack(
        pack.files[0],
        {key: Planes(*(tuple(half) for half in zip(*pairs, strict=True))) for key, pairs in extents.items()},
    )


class _Tensor(NamedTuple):
    """A tensor to write: one of the halves of all of a layer's matrices of one role."""

    name: str
    half: int
    matrices: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        return len(self.matrices) * _plane_nbytes(self.matrices[0])[self.half]


def _named(model: Model) -> Iterator[tuple[str, int, tuple[TensorInfo, ...]]]:
    for layer, experts in model.experts.items():
        for place, role in enumerate(ROLES):
            yield f"blk.{layer}.ffn_{role}_exps", layer, tuple(three[place] for three in experts.experts)


def _tensors(model: Model) -> Iterator[_Tensor]:
    for name, _, matrices in _named(model):
        for half, suffix in enumerate(("high", "low")):
            yield _Tensor(f"{name}.{suffix}", half, matrices)


def _plane_nbytes(matrix: TensorInfo) -> tuple[int, int]:
    blocks = matrix.nbytes // matrix.element.block_bytes
    high, low = plane_bytes(matrix.element)
    return blocks * high, blocks * low


def _row(tensor: TensorInfo, index: int) -> Extent:
    each = tensor.nbytes // tensor.shape[0]
    return Extent(path=tensor.extent.path, offset=tensor.extent.offset + index * each, nbytes=each)


def _check_room(output: Path, nbytes: int) -> None:
    """
    Raises:
        StorageError: no such folder, or too little room in it.
    """
    folder = output.parent
    if not folder.is_dir():
        raise StorageError(
            f"pack {output}: no such folder {folder}; make it, or choose another place", path=str(output)
        )
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise StorageError(
            f"pack {output}: needs {format_size(nbytes)}, {folder} has {format_size(free)} free; make room there, or "
            "choose another place with --output",
            path=str(output),
        )


def _samples(model: Model) -> str:
    """A hex digest over a few bytes of each layer's experts: another model may have the same names and shapes."""
    digest = hashlib.sha256()
    for _, _, matrices in _named(model):
        for matrix in (matrices[0], matrices[len(matrices) // 2], matrices[-1]):
            start = matrix.nbytes // 2
            nbytes = min(_SAMPLE_BYTES, matrix.nbytes - start)
            with matrix.extent.path.open("rb") as file:
                digest.update(
                    _read(file, replace(matrix.extent, offset=matrix.extent.offset + start, nbytes=nbytes)).tobytes()
                )
    return digest.hexdigest()


def _write(path: Path, writer: GGUFWriter, tensors: list[_Tensor], progress: OnProgress | None) -> int:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        for tensor in tensors:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            for matrix in tensor.matrices:
                file.write(_plane(matrix, tensor.half))
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
        file.write(bytes(-file.tell() % _ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _header(path: Path, checkpoint: Checkpoint, samples: str, tensors: list[_Tensor]) -> GGUFWriter:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_name(f"coarse copies of the experts of {checkpoint.path.name}")
    writer.add_uint32(_VERSION_KEY, VERSION)
    writer.add_string(_MODEL_KEY, checkpoint.fingerprint)
    writer.add_string(_SAMPLES_KEY, samples)
    for tensor in tensors:
        shape = (len(tensor.matrices), tensor.nbytes // len(tensor.matrices))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.int8), tensor.nbytes)
    return writer


def _plane(matrix: TensorInfo, half: int) -> bytes:
    with matrix.extent.path.open("rb") as file:
        raw = _read(file, matrix.extent)
    return split(raw.reshape(-1, matrix.element.block_bytes), matrix.element)[half].tobytes()


def _read(file: BinaryIO, extent: Extent) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    file.seek(extent.offset)
    data = file.read(extent.nbytes)
    if len(data) != extent.nbytes:
        raise StorageError(
            f"{extent.path}: ends early at offset {extent.offset + len(data)}; download it again", path=str(extent.path)
        )
    return np.frombuffer(data, np.uint8)
