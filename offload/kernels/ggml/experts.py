"""Computes experts where they lie: in the slots of a bank, by graphs that are cached by how much they compute.

    one token        all experts that are there by one product:   slots [n, 1], x [1, 1, hidden_size]
    many tokens      one expert for the n tokens sent to it:      x [n, 1, hidden_size], gathered, and scattered again

In both, a row is the dot product that `ggml_mul_mat_id` computes for it, whatever else is computed beside it, so that the
bits do not depend on which experts happen to be there. Layers of one shape share a bank, and so its graphs: the tensors are
pointed at the layer's matrices, the memory of its routing and the slot before each run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from offload.config import MICRO_BATCH_TOKENS
from offload.elements import F32
from offload.kernels.batch import ExpertPlace
from offload.kernels.ggml.library import FLOAT_BYTES, GLU_OPS, I32, I64, Library
from offload.kernels.ggml.workspace import Workspace
from offload.models.base import ExpertLayer

MAX_GRAPHS: Final = MICRO_BATCH_TOKENS  # one for every number of tokens that an expert may get
_TENSORS: Final = 24

Anchor = Callable[[int], ctypes.c_uint64]


class Routed(NamedTuple):
    """Memory of one micro-batch's routing.

    Attributes:
        ids: int32 [layers with experts, tokens, num_used], the choice of every layer of the pass.
        x: float32 [tokens, hidden_size], what the experts of the layer at hand get.
        returned: float32 [tokens, num_used, hidden_size], what they return.
    """

    ids: npt.NDArray[np.int32]
    x: npt.NDArray[np.float32]
    returned: npt.NDArray[np.float32]


@dataclass(slots=True)
class _Graph:
    """A graph over `count` experts of a token or tokens of an expert, and the arrays that its leaves read."""

    contexts: tuple[int, ...]
    graph: int
    x: ctypes.c_uint64
    returned: ctypes.c_uint64
    slots: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int64]


class ExpertKernels:
    """The graphs of one bank. `layer` stands for all that share it."""

    def __init__(
        self, library: Library, anchor: Anchor, layer: ExpertLayer, place: ExpertPlace, hidden_size: int
    ) -> None:
        self._lib = library
        self._anchor = anchor
        self._activation = GLU_OPS[layer.activation]
        self._num_used = layer.num_used
        self._hidden_size = hidden_size
        self._place = place
        self._context = library.context(8 * library.ggml_tensor_overhead())
        self._banks = self._tensors(layer, place.num_slots, place.stride)
        self._singles = self._tensors(layer, 1, place.stride)
        self._workspace: Workspace[_Graph] = Workspace(library, MAX_GRAPHS)

    def run_token(
        self, backend: int, place: ExpertPlace, routed: Routed, slots: Sequence[int], ranks: Sequence[int]
    ) -> int:
        """Computes the experts in `slots` for the only token; `ranks` are their places in its choice. ggml's status."""
        graph = self._graph(len(slots), single=False)
        self._point(self._banks, place.address, place.offsets)
        graph.slots[:] = slots
        graph.targets[:] = ranks
        return self._compute(backend, graph, routed)

    def run_expert(
        self, backend: int, place: ExpertPlace, routed: Routed, slot: int, pairs: npt.NDArray[np.int64]
    ) -> int:
        """Computes one expert for the pairs of token and rank, token * num_used + rank, that it was chosen for."""
        graph = self._graph(len(pairs), single=True)
        self._point(self._singles, place.address + slot * place.stride, place.offsets)
        graph.tokens[:] = pairs // self._num_used
        graph.targets[:] = pairs
        return self._compute(backend, graph, routed)

    def reserve(self, tokens: int) -> int:
        """Builds the largest graphs once, and tells how many bytes they need beside what is always there."""
        for count, single in ((self._num_used, False), (tokens, True)):
            self._graph(count, single=single)
        return self._workspace.nbytes

    def release(self) -> None:
        """Drops graphs and their memory; later ones take it anew."""
        self._workspace.release()

    def close(self) -> None:
        """Frees everything."""
        self._workspace.release()
        self._lib.ggml_free(self._context)

    def _tensors(self, layer: ExpertLayer, count: int, stride: int) -> list[tuple[int, ctypes.c_uint64]]:
        tensors = []
        for matrix in layer.experts[0]:
            rows, columns = matrix.shape
            tensor = self._lib.ggml_new_tensor_3d(self._context, matrix.element.ggml_id, columns, rows, count)
            self._lib.set_matrix_stride(tensor, stride, count)
            tensors.append((tensor, self._anchor(tensor)))
        return tensors

    @staticmethod
    def _point(tensors: Sequence[tuple[int, ctypes.c_uint64]], address: int, offsets: Sequence[int]) -> None:
        for (_, cell), offset in zip(tensors, offsets, strict=True):
            cell.value = address + offset

    def _compute(self, backend: int, graph: _Graph, routed: Routed) -> int:
        graph.x.value = routed.x.ctypes.data
        graph.returned.value = routed.returned.ctypes.data
        return int(self._lib.ggml_backend_graph_compute(backend, graph.graph))

    def _graph(self, count: int, *, single: bool) -> _Graph:
        found = self._workspace.get((count, single))
        if found is None:
            found = self._build(count, single=single)
            self._workspace.add((count, single), found)
        return found

    def _build(self, count: int, *, single: bool) -> _Graph:
        lib: Any = self._lib
        context = lib.context(_TENSORS * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(_TENSORS, False))
        graph = lib.ggml_new_graph_custom(context, _TENSORS, False)
        slots, tokens = np.zeros(count, np.int32), np.zeros(count, np.int32)
        targets = np.zeros(count, np.int64)
        rows = MICRO_BATCH_TOKENS if single else 1
        x = lib.ggml_new_tensor_3d(context, F32.ggml_id, self._hidden_size, rows, 1)
        x_cell = self._anchor(x)
        returned = lib.ggml_new_tensor_2d(context, F32.ggml_id, self._hidden_size, rows * self._num_used)
        self._anchor(returned)
        which = self._array(lib.ggml_new_tensor_2d(context, I32, *((1, count) if single else (count, 1))), slots)
        where = self._array(lib.ggml_new_tensor_1d(context, I64, count), targets)
        if single:
            x = lib.ggml_get_rows(context, x, self._array(lib.ggml_new_tensor_1d(context, I32, count), tokens))
            x = lib.ggml_reshape_3d(context, x, self._hidden_size, 1, count)
        (gate, _), (up, _), (down, _) = self._singles if single else self._banks
        raised = lib.ggml_mul_mat_id(context, up, x, which)
        gated = lib.ggml_mul_mat_id(context, gate, x, which)
        hidden = lib.ggml_glu_split(context, gated, raised, self._activation)
        result = lib.ggml_mul_mat_id(context, down, hidden, which)
        flat = lib.ggml_reshape_2d(context, result, self._hidden_size, count)
        scattered = lib.ggml_set_rows(context, returned, flat, where)  # a view, which has a data pointer of its own
        lib.ggml_build_forward_expand(graph, scattered)
        self._workspace.allocate(graph)
        return _Graph((context,), graph, x_cell, lib.data_cell(scattered), slots, tokens, targets)

    def _array(self, tensor: int, values: npt.NDArray[Any]) -> int:
        """A leaf that reads `values` for good."""
        self._anchor(tensor).value = values.ctypes.data
        return tensor


def routing_memory(layers: int, tokens: int, num_used: int, hidden_size: int, *, returned: bool) -> Routed:
    """Memory for micro-batches of up to `tokens` tokens; without `returned` only the choices are kept."""
    rows = tokens if returned else 0
    return Routed(
        np.zeros((layers, tokens, num_used), np.int32),
        np.zeros((rows, hidden_size), np.float32),
        np.zeros((rows, num_used, hidden_size), np.float32),
    )


def routing_nbytes(layers: int, tokens: int, num_used: int, hidden_size: int) -> int:
    """Bytes of `routing_memory`."""
    return tokens * (layers * num_used * 4 + (1 + num_used) * hidden_size * FLOAT_BYTES)
