"""The KV cache as ggml tensors: for every layer and head of it a table of positions; in a row the key, then the value.

    layer 0   head 0   [ k v | k v | k v ...   ctx rows ]
              head 1   [ k v | k v | k v ...            ]
    layer 1   ...

Attention of a head reads one run of memory, and its positions are one run of a file. Where values are the leading features
of keys, rows are keys. Rows are as long as makes a bucket of them whole pages, so that it can be given back to the system by
itself. Holds no memory for them: the tensors are pointed at what `place` is given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Set as AbstractSet
from typing import Final

import numpy as np
import numpy.typing as npt

from offload.blocks import BlockKey
from offload.config import KV_BUCKET
from offload.elements import F32, KVTypes
from offload.kernels.batch import Bytes
from offload.kernels.ggml.anchor import Anchor
from offload.kernels.ggml.library import Library
from offload.kernels.ggml.ops import KVTensors
from offload.kernels.ggml.rotation import Rotation, hadamard, rotation_orders
from offload.kernels.ggml.table_attention import TableForm
from offload.models.base import Model
from offload.units import PAGE, align_up

_ROW_GRAIN: Final = PAGE // KV_BUCKET
_START_GRAIN: Final = 4  # of numbers in a row: float32 behind blocks of 18 bytes


class KVCache:
    """See the module.

    Attributes:
        layers: the tensors of every layer.
    """

    def __init__(self, library: Library, anchor: Anchor, model: Model, ctx: int, types: KVTypes) -> None:
        self._lib = library
        self._elsewhere: frozenset[int] = frozenset()
        config = model.config
        self._heads, self._rows = config.num_kv_heads, buckets_of(ctx) * KV_BUCKET
        self._row_nbytes = row_nbytes(model, types)
        count = config.num_layers * len(config.cache_dims)
        self._context = library.context((count + 3) * library.ggml_tensor_overhead())
        self._kept: list[npt.NDArray[np.float32]] = []
        rotations = [self._rotation(anchor, order) for order in rotation_orders(config, types)]
        self._cells: list[list[ctypes.c_uint64]] = []
        self._starts = _starts(model, types)[:-1]
        last = len(self._starts) - 1  # values, or where they are the leading features of keys, these
        self._form = TableForm(
            types.key, (types.key, types.value)[last], config.cache_dims[0],
            config.cache_dims[1] if last else _value_dim(model), self._starts[last], self._row_nbytes,
        )  # fmt: skip
        self.layers: list[KVTensors] = []
        table = self._rows * self._row_nbytes
        for _ in range(config.num_layers):
            tensors = [
                library.ggml_new_tensor_3d(self._context, element.ggml_id, dims, self._rows, self._heads)
                for element, dims in zip(types, config.cache_dims, strict=False)
            ]
            self._cells.append([anchor(tensor) for tensor in tensors])
            for tensor in tensors:
                library.set_strides(tensor, self._row_nbytes, table, self._heads)
            value = tensors[1] if len(tensors) > 1 else None
            self.layers.append(KVTensors(tensors[0], value, self._row_nbytes, table, *rotations))

    @property
    def form(self) -> TableForm:
        """How the tables lie."""
        return self._form

    def place(self, address: int, elsewhere: AbstractSet[int]) -> None:
        """Puts the cache at `address`: page-aligned, `cache_nbytes` long, zeroed (masked keys are still multiplied).

        Before the first pass: graphs hold the address. The tables of layers that are `elsewhere` take no memory.
        """
        self._elsewhere = frozenset(elsewhere)
        for layer, cells in enumerate(self._cells):
            if layer in elsewhere:
                continue
            for cell, start in zip(cells, self._starts, strict=True):
                cell.value = address + start
            address += self._heads * self._rows * self._row_nbytes

    def rows(self, layer: int, start: int, stop: int) -> Bytes:
        """Positions `[start, stop)` of a layer as stored, [num_kv_heads, positions, bytes of a row]: a view."""
        assert layer not in self._elsewhere, layer
        nbytes = self._heads * self._rows * self._row_nbytes
        memory = (ctypes.c_uint8 * nbytes).from_address(self._cells[layer][0].value)
        table = np.ctypeslib.as_array(memory).reshape(self._heads, self._rows, self._row_nbytes)
        return table[:, start:stop]

    def _rotation(self, anchor: Anchor, order: int | None) -> Rotation | None:
        if order is None:
            return None
        self._kept.append(hadamard(order))
        tensor = self._lib.ggml_new_tensor_2d(self._context, F32.ggml_id, order, order)
        anchor(tensor).value = self._kept[-1].ctypes.data
        return Rotation(tensor, order)

    def close(self) -> None:
        """Frees the tensors' descriptions."""
        self._lib.ggml_free(self._context)


def cache_nbytes(model: Model, ctx: int, types: KVTypes, layers: int | None = None) -> int:
    """Bytes of the cache of so many layers, or all, for `ctx` tokens (rounded up to the KV bucket)."""
    return num_tables(model, layers) * buckets_of(ctx) * bucket_nbytes(model, types)


def num_tables(model: Model, layers: int | None = None) -> int:
    """One for each head of each layer."""
    return (model.config.num_layers if layers is None else layers) * model.config.num_kv_heads


def _value_dim(model: Model) -> int:
    return model.config.head_dim if model.config.value_dim is None else model.config.value_dim


def table_keys(layer: int, heads: int) -> tuple[BlockKey, ...]:
    """The names of a layer's tables, as blocks that move."""
    return tuple(BlockKey("kv", layer, f"blk.{layer}.cache", head) for head in range(heads))


def bucket_nbytes(model: Model, types: KVTypes) -> int:
    """Bytes of one bucket of a table: whole pages."""
    return KV_BUCKET * row_nbytes(model, types)


def row_nbytes(model: Model, types: KVTypes) -> int:
    """Bytes of a position of one head: key, value where values are kept, and what a bucket of whole pages leaves between."""
    return align_up(_starts(model, types)[-1], _ROW_GRAIN)


def _starts(model: Model, types: KVTypes) -> list[int]:
    """Where in a row the key begins, and the value; and where the last of them ends."""
    starts = [0]
    for element, dims in zip(types, model.config.cache_dims, strict=False):
        starts.append(align_up(starts[-1] + element.row_bytes(dims), _START_GRAIN))
    return starts


def buckets_of(ctx: int) -> int:
    """Buckets of a table for `ctx` tokens."""
    return align_up(ctx, KV_BUCKET) // KV_BUCKET
