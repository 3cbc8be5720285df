"""The KV cache as ggml tensors: for every layer a table of positions for keys, and one for values where they are kept.

Holds no memory: the tensors are pointed at what `place` is given.
"""

from __future__ import annotations

import ctypes
from itertools import cycle

import numpy as np

from offload.config import KV_BUCKET, KVType
from offload.elements import element_type
from offload.kernels.batch import Bytes
from offload.kernels.ggml.anchor import Anchor
from offload.kernels.ggml.library import Library
from offload.kernels.ggml.ops import KVTensors
from offload.models.base import Model
from offload.units import align_up


class KVCache:
    """See the module.

    Attributes:
        layers: the tensors of every layer.
    """

    def __init__(self, library: Library, anchor: Anchor, model: Model, ctx: int, kv_type: KVType) -> None:
        self._lib = library
        count = model.config.num_layers * len(model.config.cache_widths)
        self._context = library.context((count + 1) * library.ggml_tensor_overhead())
        self._buckets = buckets_of(ctx)
        self._sizes = bucket_nbytes(model, kv_type)
        self._cells: list[ctypes.c_uint64] = []
        self.layers: list[KVTensors] = []
        element = element_type(kv_type.upper())
        for _ in range(model.config.num_layers):
            tensors = [
                library.ggml_new_tensor_2d(self._context, element.ggml_id, width, self._buckets * KV_BUCKET)
                for width in model.config.cache_widths
            ]
            self.layers.append(KVTensors(tensors[0], tensors[1] if len(tensors) > 1 else None, element.block_bytes))
            self._cells += [anchor(tensor) for tensor in tensors]

    def place(self, address: int) -> None:
        """Puts the cache at `address`: page-aligned, `cache_nbytes` long, zeroed (masked keys are still multiplied).

        Before the first pass: graphs hold the address.
        """
        for cell, nbytes in zip(self._cells, cycle(self._sizes), strict=False):
            cell.value = address
            address += self._buckets * nbytes

    def rows(self, layer: int, positions: int) -> tuple[Bytes, ...]:
        """The first positions of a layer as stored, [positions, bytes of a row] for each tensor: views."""
        views, count = [], len(self._sizes)
        for cell, nbytes in zip(self._cells[layer * count :], self._sizes, strict=False):
            width = nbytes // KV_BUCKET
            memory = (ctypes.c_uint8 * (positions * width)).from_address(cell.value)
            views.append(np.ctypeslib.as_array(memory).reshape(positions, width))
        return tuple(views)

    def close(self) -> None:
        """Frees the tensors' descriptions."""
        self._lib.ggml_free(self._context)


def cache_nbytes(model: Model, ctx: int, kv_type: KVType) -> int:
    """Bytes of the cache for `ctx` tokens (rounded up to the KV bucket): key, then value of every layer."""
    return model.config.num_layers * buckets_of(ctx) * sum(bucket_nbytes(model, kv_type))


def bucket_nbytes(model: Model, kv_type: KVType) -> tuple[int, ...]:
    """Bytes of one bucket of each tensor of one layer: of the keys, and of the values where they are kept."""
    each = element_type(kv_type.upper()).block_bytes
    return tuple(KV_BUCKET * width * each for width in model.config.cache_widths)


def buckets_of(ctx: int) -> int:
    """Buckets of a cache for `ctx` tokens."""
    return align_up(ctx, KV_BUCKET) // KV_BUCKET
