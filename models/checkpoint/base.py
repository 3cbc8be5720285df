"""What a parsed checkpoint is, whatever its format. Parsing is in `gguf` and `safetensors`; nothing here reads a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

from offload.blocks import Extent
from offload.elements import ElementType

Format = Literal["gguf", "huggingface"]


class Scales(NamedTuple):
    """Factors of a matrix's elements that lie apart from it, one for each block of `rows` by `columns`.

    Attributes:
        vector: of the model, float32, which holds those of one or of several matrices, one after the other.
        number: which of those this one is.
    """

    vector: str
    number: int
    rows: int
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks a matrix of this shape has in each direction; the last ones may be cut off."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor and where its bytes lie. `shape` is outermost first: a linear weight is (out_features, in_features).

    `scales`: of a matrix whose elements mean nothing without, see `elements.F8_E4M3`.
    """

    name: str
    element: ElementType
    shape: tuple[int, ...]
    extent: Extent
    scales: Scales | None = None

    @property
    def nbytes(self) -> int:
        return self.extent.nbytes

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row (the last dimension)."""
        return self.element.row_bytes(self.shape[-1])

    def rows(self, start: int, stop: int) -> TensorInfo:
        """Rows `[start, stop)` of a matrix as a tensor of their own, in place. Without scales, which are of the whole."""
        assert len(self.shape) == 2 and 0 <= start < stop <= self.shape[0], (self.shape, start, stop)
        num_rows, nbytes = stop - start, (stop - start) * self.row_nbytes
        extent = replace(self.extent, offset=self.extent.offset + start * self.row_nbytes, nbytes=nbytes)
        name, shape = f"{self.name}[{start}:{stop}]", (num_rows, self.shape[1])
        return replace(self, name=name, shape=shape, extent=extent, scales=None)

    def member(self, index: int) -> TensorInfo:
        """Number `index` of the matrices that a tensor of three dimensions holds, as a tensor of its own, in place."""
        assert len(self.shape) == 3 and 0 <= index < self.shape[0], (self.shape, index)
        nbytes = self.nbytes // self.shape[0]
        extent = replace(self.extent, offset=self.extent.offset + index * nbytes, nbytes=nbytes)
        return replace(self, name=f"{self.name}[{index}]", shape=self.shape[1:], extent=extent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model on disk: its tensors and its metadata, checked against the files' sizes.

    Attributes:
        path: what the user named: a .gguf file (the first of a split) or a Hugging Face folder.
        files: every file that holds tensors, in order.
        architecture: `general.architecture` of a GGUF, `model_type` of a config.json.
        metadata: GGUF key-values, or the parsed config.json.
        fingerprint: hex digest over the headers and sizes; equal for equal checkpoints at any path.
    """

    path: Path
    format: Format
    files: tuple[Path, ...]
    architecture: str
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    fingerprint: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
