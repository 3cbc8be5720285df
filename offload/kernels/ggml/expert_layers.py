"""The layers with experts of one model: where their experts can lie, the memory of choices, and who computes them.

Where all experts of a layer are resident they are computed in the pass's graph; else the graph is cut, and they are
computed by `ExpertKernels` as they arrive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

import numpy as np

from offload.config import FEW_TOKENS, MICRO_BATCH_TOKENS
from offload.kernels.batch import ExpertPlace, Floats, Foresight, Ints
from offload.kernels.ggml.anchor import Anchor
from offload.kernels.ggml.experts import Chosen, ExpertKernels, Routed, Where, routing_memory, routing_nbytes
from offload.kernels.ggml.library import FLOAT_BYTES, STATUS_SUCCESS, Library
from offload.kernels.ggml.routing import Choice
from offload.kernels.ggml.workspace import WorkspaceNeeds
from offload.models.base import ExpertLayer, Model


class ExpertLayers:
    """See the module. A micro-batch is given by the number of its workspace: 0 is that of a few tokens.

    Args:
        address: where a vector lies.
    """

    def __init__(self, library: Library, model: Model, anchor: Anchor, address: Callable[[str], int]) -> None:
        self._lib = library
        self._anchor = anchor
        self._address = address
        self._layers = model.experts
        self._hidden_size = model.config.hidden_size
        self._order = {layer: index for index, layer in enumerate(model.experts)}
        self._num_experts = max((len(layer.experts) for layer in model.experts.values()), default=0)
        self._foresight = Foresight()
        self._places: dict[int, ExpertPlace] = {}
        self._tensors: dict[int, tuple[int, int, int]] = {}
        self._cells: dict[int, list[ctypes.c_uint64]] = {}
        self._context = library.context((3 * len(model.experts) + 1) * library.ggml_tensor_overhead())
        self._kernels: dict[int, ExpertKernels] = {}
        self._by_bank: dict[tuple[object, ...], ExpertKernels] = {}
        self._memory: dict[int, Routed] = {}
        self._make_tensors()

    @property
    def fetched(self) -> frozenset[int]:
        """Layers whose experts have to be brought."""
        return frozenset(layer for layer, place in self._places.items() if not place.is_resident)

    def place(self, layer: int, place: ExpertPlace) -> None:
        """Says where the experts of a layer can lie."""
        self._places[layer] = place
        if place.is_resident:
            for tensor, cell, offset in zip(self._tensors[layer], self._cells[layer], place.offsets, strict=True):
                self._lib.set_matrix_stride(tensor, place.stride, place.num_slots)
                cell.value = place.address + offset
            return
        self._memory.clear()  # what experts return needs room of its own now
        experts = self._layers[layer]
        kinds = tuple((matrix.element.name, matrix.shape) for matrix in experts.experts[0])
        bank = (place.address, len(experts.experts), experts.num_used, experts.activation, kinds)
        if bank not in self._by_bank:
            self._by_bank[bank] = ExpertKernels(self._lib, self._anchor, experts, place, self._hidden_size)
        self._kernels[layer] = self._by_bank[bank]

    @property
    def foresight(self) -> Foresight:
        """What passes guess of later choices."""
        return self._foresight

    def set_foresight(self, foresight: Foresight) -> None:
        """Before graphs are built."""
        self._foresight = foresight._replace(width=min(foresight.width, self._num_experts))
        self._memory.clear()

    @property
    def needs(self) -> WorkspaceNeeds:
        """Memory beside the graphs, when no expert is resident: what is kept of choices, and the experts' own graphs."""
        if not self._layers:
            return WorkspaceNeeds(0, 0, 0)
        used = max(layer.num_used for layer in self._layers.values())
        few, prompt = (
            routing_nbytes(len(self._layers), tokens, used, self._hidden_size)
            for tokens in (FEW_TOKENS, MICRO_BATCH_TOKENS)
        )
        width = max(layer.experts[0].gate.shape[0] for layer in self._layers.values())
        rows = 2 * self._hidden_size + 3 * width
        return WorkspaceNeeds(few + FEW_TOKENS * rows * FLOAT_BYTES, MICRO_BATCH_TOKENS * rows * FLOAT_BYTES, prompt)

    def recorder(self, number: int, graph: int, end_piece: Callable[[], None]) -> GraphExperts:
        """What the graphs of a workspace are built with."""
        return GraphExperts(self, self._memory_of(number), graph, end_piece)

    def routed(self, number: int, layer: int, tokens: int) -> Ints:
        """The experts chosen for so many tokens, [tokens, num_used], a view."""
        used = self._layers[layer].num_used
        kept: Ints = self._memory_of(number).ids[self._order[layer]].reshape(-1)
        return kept[: tokens * used].reshape(tokens, used)

    def enter(self, number: int, layer: int, x: Floats, chosen: Ints) -> Floats:
        """Notes a choice that was made elsewhere; where its experts will leave what they return."""
        memory, tokens = self._memory_of(number), len(x)
        memory.x[:tokens] = x
        self.routed(number, layer, tokens)[:] = chosen
        return self._returned(memory, chosen)

    def skip(self, number: int, layer: int, tokens: int, below: float) -> int:
        """Leaves out the chosen experts whose share of a token's weights is smaller; tells how many."""
        memory, ids = self._memory_of(number), self.routed(number, layer, tokens)
        weights = self.weights(number, layer, tokens)
        light = weights < below * weights.sum(axis=-1, keepdims=True)
        ids[light] = -1
        self._returned(memory, ids)[light] = 0
        return int(light.sum())

    def _returned(self, memory: Routed, chosen: Ints) -> Floats:
        """What the chosen return, [tokens, num_used, hidden_size], a view."""
        rows = memory.returned.reshape(-1, self._hidden_size)[: chosen.size]
        returned: Floats = rows.reshape(*chosen.shape, self._hidden_size)
        return returned

    def weights(self, number: int, layer: int, tokens: int) -> Floats:
        """How the router weighs what it chose for so many tokens, [tokens, num_used], a view."""
        used = self._layers[layer].num_used
        kept: Floats = self._memory_of(number).weights.reshape(-1)[: tokens * used].reshape(tokens, used)
        return kept

    def foreseen(self, number: int, layer: int, ahead: int, tokens: int) -> Ints:
        """What was guessed of a layer's choice, [tokens, width], a view; no tokens where nothing was."""
        width, first = self._foresight.width, self._order[layer] < ahead
        if first or self._foresight.looks(tokens) < ahead:
            return np.empty((0, width), np.int32)
        kept: Ints = self._memory_of(number).foreseen[ahead - 1, self._order[layer]]
        return kept[: tokens * width].reshape(tokens, width)

    def compute(self, backend: int, number: int, layer: int, tokens: int, slots: Mapping[int, int]) -> int:
        """Computes the experts in `slots` for the tokens that chose them; ggml's status."""
        kernels, where = self._kernels[layer], self._where(number, layer)
        ids = self.routed(number, layer, tokens).reshape(-1)
        if tokens == 1:
            chosen = [
                Chosen(expert, slots[expert], rank) for rank, expert in enumerate(ids.tolist()) if expert in slots
            ]
            return kernels.run_token(backend, where, chosen) if chosen else STATUS_SUCCESS
        for expert, slot in slots.items():
            pairs = np.flatnonzero(ids == expert)
            if len(pairs):
                status = kernels.run_expert(backend, where, expert, slot, pairs)
                if status != STATUS_SUCCESS:
                    return status
        return STATUS_SUCCESS

    def release_prompt(self) -> None:
        """Frees what only passes of many tokens need; their graphs must be gone."""
        self._memory = {number: memory for number, memory in self._memory.items() if number == 0}
        for kernels in self._by_bank.values():
            kernels.release()

    def close(self) -> None:
        """Frees everything."""
        for kernels in self._by_bank.values():
            kernels.close()
        self._lib.ggml_free(self._context)

    # for graphs

    def layer(self, layer: int) -> ExpertLayer:
        """The description of a layer."""
        return self._layers[layer]

    def resident(self, layer: int) -> tuple[int, int, int] | None:
        """See `ops.Experts`. Before anything is placed, all experts count as resident."""
        place = self._places.get(layer)
        return self._tensors[layer] if place is None or place.is_resident else None

    def ids_address(self, memory: Routed, layer: int) -> int:
        """Where the choice of a layer is kept."""
        return int(memory.ids[self._order[layer]].ctypes.data)

    def foreseen_address(self, memory: Routed, layer: int, ahead: int) -> int:
        """Where the guess of a layer's choice is kept that was made `ahead` layers before."""
        return int(memory.foreseen[ahead - 1, self._order[layer]].ctypes.data)

    def anchor(self, tensor: int, address: int) -> None:
        """Lets a tensor live at `address` for good."""
        self._anchor(tensor).value = address

    def _where(self, number: int, layer: int) -> Where:
        biases = self._layers[layer].biases or ()
        return Where(self._places[layer], self._memory_of(number), [self._address(name) for name in biases])

    def _memory_of(self, number: int) -> Routed:
        if number not in self._memory:
            most = FEW_TOKENS if number == 0 else MICRO_BATCH_TOKENS
            used = max((layer.num_used for layer in self._layers.values()), default=0)
            returned = bool(self.fetched)
            self._memory[number] = routing_memory(
                len(self._layers), most, used, self._hidden_size, self._foresight, returned=returned
            )
        return self._memory[number]

    def _make_tensors(self) -> None:
        for layer, experts in self._layers.items():
            tensors = []
            for matrix in experts.experts[0]:
                rows, columns = matrix.shape
                count = len(experts.experts)
                tensors.append(
                    self._lib.ggml_new_tensor_3d(self._context, matrix.element.ggml_id, columns, rows, count)
                )
            gate, up, down = tensors
            self._tensors[layer] = (gate, up, down)
            self._cells[layer] = [self._anchor(tensor) for tensor in tensors]


class GraphExperts:
    """See `ops.Experts`: the experts of one graph."""

    def __init__(self, layers: ExpertLayers, memory: Routed, graph: int, end_piece: Callable[[], None]) -> None:
        self._layers = layers
        self._memory = memory
        self._graph = graph
        self.end_piece = end_piece
        self.layer = layers.layer
        self.resident = layers.resident

    def keep(self, layer: int, choice: Choice, *, x: bool) -> None:
        """See `ops.Experts.keep`."""
        self._layers.anchor(choice.ids, self._layers.ids_address(self._memory, layer))
        if x:
            self._layers.anchor(choice.x, self._memory.x.ctypes.data)

    @property
    def width(self) -> int:
        """See `ops.Experts.width`."""
        return self._layers.foresight.width

    def keep_foreseen(self, layer: int, ahead: int, ids: int) -> None:
        """See `ops.Experts.keep_foreseen`."""
        self._layers.anchor(ids, self._layers.foreseen_address(self._memory, layer, ahead))

    def keep_weights(self, weights: int) -> None:
        """See `ops.Experts.keep_weights`."""
        self._layers.anchor(weights, self._memory.weights.ctypes.data)

    def returned(self, tensor: int) -> None:
        """See `ops.Experts.returned`."""
        self._layers.anchor(tensor, self._memory.returned.ctypes.data)
