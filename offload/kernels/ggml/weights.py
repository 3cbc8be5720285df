"""A model's weights as ggml tensors: every matrix, each of its parts, every vector, and where they lie.

A matrix whose parts lie one behind the other as in the file is used as one tensor; else, and while some of its parts have to
arrive, its parts are used one by one: `forms` says which.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from offload.blocks import BlockKey
from offload.elements import F32
from offload.kernels.batch import Floats
from offload.kernels.ggml.anchor import Anchor
from offload.kernels.ggml.library import Library
from offload.kernels.ggml.pieces import Form, Part
from offload.models.base import Model
from offload.models.checkpoint.base import TensorInfo


class Weights:
    """See the module. Nothing has memory before it is placed.

    Attributes:
        keys: of a matrix's parts, by its name. forms: of the matrices that are used in parts, since `schedule`.
    """

    def __init__(self, library: Library, model: Model, anchor: Anchor) -> None:
        self._lib = library
        self._model = model
        self._anchor = anchor
        matrices = sum(1 + len(parts) for parts in model.parts.values())
        self._context = library.context((matrices + len(model.vectors) + 8) * library.ggml_tensor_overhead())
        layers = {name: stage.layer for stage in model.stages for name in stage.matrices}
        self.keys = {
            name: tuple(BlockKey("weight", layers[name], name, number) for number in range(len(parts)))
            for name, parts in model.parts.items()
        }
        self.forms: dict[str, Form] = {}
        self._tensors: dict[str, int] = {}
        self._cells: dict[str, ctypes.c_uint64] = {}
        self._parts: dict[BlockKey, int] = {}
        self._part_cells: dict[BlockKey, ctypes.c_uint64] = {}
        self._vectors: dict[str, Floats] = {}
        self._make_tensors()

    @property
    def num_parts(self) -> int:
        """Parts of all matrices."""
        return len(self._parts)

    def tensor(self, name: str) -> int:
        """Of a whole matrix, or of a vector."""
        return self._tensors[name]

    def part_tensor(self, key: BlockKey) -> int:
        """Of a part of a matrix."""
        return self._parts[key]

    def part(self, key: BlockKey) -> TensorInfo:
        """What the file says of a part."""
        return self._model.parts[key.name][key.part]

    def vector_address(self, name: str) -> int:
        """Where a vector lies."""
        return int(self._cells[name].value)

    def place(self, key: BlockKey, address: int) -> None:
        """A matrix, or a part of one, now lies at `address`."""
        self._part_cells[key].value = address

    def place_vector(self, name: str, values: Floats) -> None:
        """Gives vector `name` its values, float32; kept alive here."""
        self._vectors[name] = np.ascontiguousarray(values, dtype=np.float32)
        self._cells[name].value = self._vectors[name].ctypes.data

    def schedule(self, streamed: AbstractSet[BlockKey]) -> None:
        """These parts will arrive during passes, all others have been placed."""
        self.forms = {}
        for name, keys in self.keys.items():
            form = tuple(Part(key, key in streamed) for key in keys)
            if any(part.is_streamed for part in form) or not self._is_contiguous(keys):
                self.forms[name] = form
            else:
                self._cells[name].value = self._part_cells[keys[0]].value

    def close(self) -> None:
        """Frees the tensors' descriptions."""
        self._lib.ggml_free(self._context)

    def _make_tensors(self) -> None:
        for name, info in self._model.matrices.items():
            self._adopt(name, self._matrix(info))
            for key, part in zip(self.keys[name], self._model.parts[name], strict=True):
                self._parts[key] = self._matrix(part)
                self._part_cells[key] = self._anchor(self._parts[key])
        for name, vector in self._model.vectors.items():
            rows, length = (1, *vector.shape)[-2:]
            self._adopt(name, self._lib.ggml_new_tensor_2d(self._context, F32.ggml_id, length, rows))

    def _matrix(self, info: TensorInfo) -> int:
        """A tensor for a matrix, or for one of each head."""
        heads, rows, columns = (1, *info.shape)[-3:]
        tensor: int = self._lib.ggml_new_tensor_3d(self._context, info.element.ggml_id, columns, rows, heads)
        return tensor

    def _adopt(self, name: str, tensor: int) -> None:
        self._tensors[name] = tensor
        self._cells[name] = self._anchor(tensor)

    def _is_contiguous(self, keys: Sequence[BlockKey]) -> bool:
        """Whether the parts of a matrix lie as they do in the file, so that they can be used as one."""
        ends = [self._part_cells[key].value + self.part(key).nbytes for key in keys[:-1]]
        return ends == [self._part_cells[key].value for key in keys[1:]]
