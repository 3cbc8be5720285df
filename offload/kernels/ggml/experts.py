"""Computes experts where they lie: in the slots of a bank, by graphs that are cached by how much they compute.

    one token        all experts that are there by one product:   slots [n, 1], x [1, 1, hidden_size]
    many tokens      one expert for the n tokens sent to it:      x [n, 1, hidden_size], gathered, and scattered again

In both, a row is the dot product that `ggml_mul_mat_id` computes for it, whatever else is computed beside it, so that the
bits do not depend on which experts happen to be there. Layers of one shape share a bank, and so its graphs: the tensors are
pointed at the layer's matrices, the memory of its routing and the slot before each run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from offload.config import MICRO_BATCH_TOKENS
from offload.elements import F32
from offload.kernels.batch import ExpertPlace, Foresight
from offload.kernels.ggml.anchor import Anchor
from offload.kernels.ggml.library import FLOAT_BYTES, I32, I64, Library
from offload.kernels.ggml.workspace import Workspace
from offload.kernels.ops import Activation
from offload.models.base import ExpertLayer

MAX_GRAPHS: Final = MICRO_BATCH_TOKENS  # one for every number of tokens that an expert may get
_TENSORS: Final = 32


class Routed(NamedTuple):
    """Memory of one micro-batch's routing.

    Attributes:
        ids: int32 [layers with experts, tokens, num_used], the choice of every layer of the pass.
        x: float32 [tokens, hidden_size], what the experts of the layer at hand get.
        weights: float32 [tokens, num_used], of the layer's choice. returned: float32 [tokens, num_used, hidden_size].
        foreseen: int32 [lookahead, layers with experts, tokens * width], guesses of choices.
    """

    ids: npt.NDArray[np.int32]
    x: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    returned: npt.NDArray[np.float32]
    foreseen: npt.NDArray[np.int32]


class Where(NamedTuple):
    """Where the experts of a layer lie, the memory of the micro-batch's routing, and addresses of the layer's biases."""

    place: ExpertPlace
    routed: Routed
    biases: Sequence[int]


class Chosen(NamedTuple):
    """An expert of a token: its number in the layer, its slot, and its place in the choice."""

    expert: int
    slot: int
    rank: int


def expert_nodes(
    lib: Any, context: int, activation: Activation, matrices: Sequence[int], x: int, which: int,
    biases: Sequence[int] | None, experts: int,
) -> int:  # fmt: skip
    """Records the gated feed-forwards of chosen experts, in llama.cpp's order.

    Args:
        matrices: tensors of gate, up and down. x: [num_tokens, 1, hidden_size].
        which: for each token, the indices of the matrices to use.
        biases: tensors [num_experts, out_features], or None; `experts` are the indices into them, shaped as `which`.
    """

    def product(role: int, factor: int) -> int:
        node: int = lib.ggml_mul_mat_id(context, matrices[role], factor, which)
        return node if biases is None else int(lib.ggml_add_id(context, node, biases[role], experts))

    raised, gated = product(1, x), product(0, x)
    return product(2, lib.gated_unit(context, gated, raised, activation))


@dataclass(slots=True)
class _Graph:
    """A graph over `count` experts of a token or tokens of an expert, and the arrays that its leaves read."""

    contexts: tuple[int, ...]
    graph: int
    x: ctypes.c_uint64
    returned: ctypes.c_uint64
    experts: npt.NDArray[np.int32]
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
        self._activation = layer.activation
        self._num_used = layer.num_used
        self._hidden_size = hidden_size
        self._context = library.context(12 * library.ggml_tensor_overhead())
        self._banks = self._tensors(layer, place.num_slots, place.stride)
        self._singles = self._tensors(layer, 1, place.stride)
        self._biases = self._bias_tensors(layer)
        self._workspace: Workspace[_Graph] = Workspace(library, MAX_GRAPHS)

    def run_token(self, backend: int, where: Where, chosen: Sequence[Chosen]) -> int:
        """Computes some of the experts of the only token; ggml's status."""
        graph = self._graph(len(chosen), single=False)
        self._point(self._banks, where.place.address, where.place.offsets)
        graph.experts[:], graph.slots[:], graph.targets[:] = zip(*chosen, strict=True)
        return self._compute(backend, graph, where)

    def run_expert(self, backend: int, where: Where, expert: int, slot: int, pairs: npt.NDArray[np.int64]) -> int:
        """Computes one expert for the pairs of token and rank, token * num_used + rank, that it was chosen for."""
        graph = self._graph(len(pairs), single=True)
        self._point(self._singles, where.place.address + slot * where.place.stride, where.place.offsets)
        graph.experts[:] = expert
        graph.tokens[:] = pairs // self._num_used
        graph.targets[:] = pairs
        return self._compute(backend, graph, where)

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

    def _bias_tensors(self, layer: ExpertLayer) -> list[tuple[int, ctypes.c_uint64]]:
        if layer.biases is None:
            return []
        tensors = [
            self._lib.ggml_new_tensor_2d(self._context, F32.ggml_id, matrix.shape[0], len(layer.experts))
            for matrix in layer.experts[0]
        ]
        return [(tensor, self._anchor(tensor)) for tensor in tensors]

    @staticmethod
    def _point(tensors: Sequence[tuple[int, ctypes.c_uint64]], address: int, offsets: Sequence[int]) -> None:
        for (_, cell), offset in zip(tensors, offsets, strict=True):
            cell.value = address + offset

    def _compute(self, backend: int, graph: _Graph, where: Where) -> int:
        self._point(self._biases, 0, where.biases)
        graph.x.value = where.routed.x.ctypes.data
        graph.returned.value = where.routed.returned.ctypes.data
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
        experts, slots, tokens = (np.zeros(count, np.int32) for _ in range(3))
        targets = np.zeros(count, np.int64)
        rows = MICRO_BATCH_TOKENS if single else 1
        x = lib.ggml_new_tensor_3d(context, F32.ggml_id, self._hidden_size, rows, 1)
        x_cell = self._anchor(x)
        returned = lib.ggml_new_tensor_2d(context, F32.ggml_id, self._hidden_size, rows * self._num_used)
        self._anchor(returned)
        chosen = (1, count) if single else (count, 1)
        which = self._array(lib.ggml_new_tensor_2d(context, I32, *chosen), slots)
        names = self._array(lib.ggml_new_tensor_2d(context, I32, *chosen), experts)
        where = self._array(lib.ggml_new_tensor_1d(context, I64, count), targets)
        if single:
            x = lib.ggml_get_rows(context, x, self._array(lib.ggml_new_tensor_1d(context, I32, count), tokens))
            x = lib.ggml_reshape_3d(context, x, self._hidden_size, 1, count)
        (gate, _), (up, _), (down, _) = self._singles if single else self._banks
        biases = [tensor for tensor, _ in self._biases] or None
        result = expert_nodes(lib, context, self._activation, (gate, up, down), x, which, biases, names)
        flat = lib.ggml_reshape_2d(context, result, self._hidden_size, count)
        scattered = lib.ggml_set_rows(context, returned, flat, where)  # a view, which has a data pointer of its own
        lib.ggml_build_forward_expand(graph, scattered)
        self._workspace.allocate(graph)
        return _Graph((context,), graph, x_cell, lib.data_cell(scattered), experts, slots, tokens, targets)

    def _array(self, tensor: int, values: npt.NDArray[Any]) -> int:
        """A leaf that reads `values` for good."""
        self._anchor(tensor).value = values.ctypes.data
        return tensor


def routing_memory(
    layers: int, tokens: int, num_used: int, hidden_size: int, foresight: Foresight, *, returned: bool
) -> Routed:
    """Memory for micro-batches of up to `tokens` tokens; without `returned` only choices and guesses are kept."""
    rows, guessing = tokens if returned else 0, tokens if foresight.in_prompts else 1
    return Routed(
        np.zeros((layers, tokens, num_used), np.int32),
        np.zeros((rows, hidden_size), np.float32),
        np.zeros((rows, num_used), np.float32),
        np.zeros((rows, num_used, hidden_size), np.float32),
        np.zeros((foresight.lookahead, layers, guessing * foresight.width), np.int32),
    )


def routing_nbytes(layers: int, tokens: int, num_used: int, hidden_size: int) -> int:
    """Bytes of `routing_memory`."""
    return tokens * (layers * num_used * 4 + (num_used + (1 + num_used) * hidden_size) * FLOAT_BYTES)
