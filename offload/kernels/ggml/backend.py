"""The ggml backend: runs a model on the CPU as cached graphs, straight from the memory where the tiers put the weights.

Graphs share the tensors of weights, cache and experts; when one moves, its data pointer is set and every cached graph
follows. A graph spans the whole model and is run in pieces: it is cut before each product that needs a block
which has to arrive, and everything in between stays in the graph's workspace. Graphs are cached by token count, KV bucket
and output count. Called from one thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from time import perf_counter
from typing import Final

import numpy as np

from offload.blocks import BlockKey
from offload.config import FEW_TOKENS, KV_BUCKET, MICRO_BATCH_TOKENS
from offload.elements import F16, F32, KVTypes
from offload.errors import BackendError, Cancelled
from offload.kernels.batch import Bytes, ExpertPlace, Floats, Foresight, Ints, MicroBatch, Piece
from offload.kernels.ggml.anchor import Anchor
from offload.kernels.ggml.cache import KVCache, num_tables, table_keys
from offload.kernels.ggml.expert_layers import ExpertLayers
from offload.kernels.ggml.inputs import BatchInputs, bucket
from offload.kernels.ggml.library import (
    I32,
    I64,
    STATUS_ABORTED,
    STATUS_SUCCESS,
    AbortCallback,
    Library,
    load_library,
)
from offload.kernels.ggml.ops import GgmlOps, GraphInputs, Node
from offload.kernels.ggml.pieces import Cutter, cut_passes
from offload.kernels.ggml.table_attention import TENSORS_PER_HEAD, Attended, Moving, head_nodes
from offload.kernels.ggml.weights import Weights
from offload.kernels.ggml.workspace import Graph, Workspace, WorkspaceNeeds
from offload.models.base import Model
from offload.tiers.base import CancelToken
from offload.units import MIB, align_up

TENSORS_PER_STAGE: Final = 64  # at most, counting views


class GgmlBackend:
    """See the module. Weights and cache have no memory before `place` and `place_cache` give it to them."""

    name = "ggml"

    def __init__(self, model: Model, ctx: int, *, threads: int, kv_types: KVTypes) -> None:
        self._lib: Library = load_library()
        self._model = model
        self._ctx = ctx
        self._threads = threads
        self._backend = self._open_backend()
        self._anchor = Anchor(self._lib)
        self._windows = tuple(dict.fromkeys(model.config.sliding_windows))
        self._weights = Weights(self._lib, model, self._anchor)
        self._cache = KVCache(self._lib, self._anchor, model, ctx, kv_types)
        self._experts = ExpertLayers(self._lib, model, self._anchor, self._weights.vector_address)
        self._few: Workspace[Graph] = Workspace(self._lib)
        self._prompts: list[Workspace[Graph]] = [
            Workspace(self._lib)
        ]  # one for each micro-batch: a pass leaves several unfinished at a time
        self._tables: dict[int, tuple[BlockKey, ...]] = {}
        self._table_addresses: dict[BlockKey, int] = {}
        self._pieces: list[Piece] = []
        self._cancel: CancelToken | None = None
        self._inputs: list[BatchInputs] = []
        self._hidden = np.empty(0, np.float32)
        self._offsets: list[int] = []
        self._logits_offsets: list[int] = []
        self._logits = np.empty(0, np.float32)

    # ---- memory

    def stream_tables(self, layers: AbstractSet[int]) -> None:
        """The caches of these layers arrive during passes, by `table_keys`; before the others are placed."""
        self._tables = {layer: table_keys(layer, self._model.config.num_kv_heads) for layer in sorted(layers)}

    def place_cache(self, address: int) -> None:
        """See `KVCache.place`."""
        self._cache.place(address, self._tables.keys())

    def place(self, key: BlockKey, address: int) -> None:
        """A matrix, or a part of one, or a table of the cache, now lies at `address`."""
        if key.kind == "kv":
            self._table_addresses[key] = address
        else:
            self._weights.place(key, address)

    def place_vector(self, name: str, values: Floats) -> None:
        """Gives vector `name` its values, float32; kept alive here."""
        self._weights.place_vector(name, values)

    def place_experts(self, layer: int, place: ExpertPlace) -> None:
        """Says where the experts of a layer can lie; before `schedule`."""
        self._experts.place(layer, place)

    def set_foresight(self, foresight: Foresight) -> None:
        """See `Backend.set_foresight`."""
        self._experts.set_foresight(foresight)

    def schedule(self, streamed: AbstractSet[BlockKey]) -> list[Piece]:
        """See `Backend.schedule`."""
        self._forget_graphs()
        self._weights.schedule(streamed)
        self._pieces = cut_passes(self._model, self._weights.keys, streamed, self._experts.fetched, self._tables)
        return self._pieces

    def reserve(self) -> WorkspaceNeeds:
        """Builds the largest graphs once, so that no later one needs more, and tells what they need."""
        for number, most in enumerate((FEW_TOKENS, MICRO_BATCH_TOKENS)):
            workspace = self._workspace(number)
            tokens = min(most, self._ctx)
            batch = MicroBatch(self._ctx - tokens, tokens, (0,))
            inputs = BatchInputs(batch, align_up(self._ctx, KV_BUCKET), self._windows)
            workspace.free(self._build(inputs, number))
        experts = self._experts.needs
        return WorkspaceNeeds(
            few=self._few.nbytes + self._scratch_nbytes(FEW_TOKENS) + experts.few,
            prompt=self._scratch_nbytes(MICRO_BATCH_TOKENS) + experts.prompt,
            micro_batch=self._prompts[0].nbytes + experts.micro_batch,
        )

    def _scratch_nbytes(self, tokens: int) -> int:
        """An upper bound of what ggml itself takes for a graph: activations in the kernel's type, attention's tiles."""
        widest = max(tensor.shape[1] for tensor in self._model.all_matrices())
        return min(tokens, self._ctx) * (widest * 2 + 16 * 1024) + MIB

    def release_prompt(self) -> None:
        """Frees what only passes of many tokens need."""
        for workspace in self._prompts:
            workspace.release()
        self._experts.release_prompt()
        self._inputs = []
        self._hidden = self._logits = np.empty(0, np.float32)
        self._lib.ggml_backend_free(self._backend)  # it keeps the scratch memory of its largest graph
        self._backend = self._open_backend()
        self.set_cancel(self._cancel)

    # ---- running

    def begin(self, batches: Sequence[MicroBatch], hidden: Floats) -> None:
        """See `Backend.begin`."""
        size = self._model.config.hidden_size
        if self._hidden.size < hidden.size:
            self._hidden = np.empty(hidden.size, np.float32)
        self._hidden[: hidden.size] = hidden.reshape(-1)
        self._inputs = [
            BatchInputs(batch, bucket(batch.kv_length, align_up(self._ctx, KV_BUCKET)), self._windows)
            for batch in batches
        ]
        starts = np.cumsum([0, *(batch.num_tokens for batch in batches)])
        self._offsets = [int(start) * size * 4 for start in starts[:-1]]
        rows = np.cumsum([0, *(len(batch.outputs) for batch in batches)]) * self._model.config.vocab_size
        self._logits_offsets = [int(start) for start in rows[:-1]]
        if self._logits.size < rows[-1]:
            self._logits = np.empty(int(rows[-1]), np.float32)

    def run(self, piece: int, batch: int) -> float:
        """See `Backend.run`."""
        graph = self._graph_for(batch)
        if piece == 0:
            self._point(graph, batch)
        if piece >= len(graph.pieces):
            return 0.0  # nothing of this batch is wanted past the last attention
        for key in self._pieces[piece].streamed if graph.tables else ():
            for cell, offset in graph.tables.get(key, ()):
                cell.value = self._table_addresses[key] + offset
        start = perf_counter()
        status = self._lib.ggml_backend_graph_compute(self._backend, graph.pieces[piece])
        kernels_s = perf_counter() - start
        _check(status, f"piece {piece} of a pass")
        return kernels_s

    def routed(self, batch: int, layer: int) -> Ints:
        """See `Backend.routed`."""
        return self._experts.routed(self._number(batch), layer, self._tokens_at(batch, layer))

    def skip(self, batch: int, layer: int, below: float) -> int:
        """See `Backend.skip`."""
        return self._experts.skip(self._number(batch), layer, self._tokens_at(batch, layer), below)

    def weights(self, batch: int, layer: int) -> Floats:
        """See `Backend.weights`."""
        return self._experts.weights(self._number(batch), layer, self._tokens_at(batch, layer))

    def foreseen(self, batch: int, layer: int, ahead: int) -> Ints:
        """See `Backend.foreseen`."""
        return self._experts.foreseen(self._number(batch), layer, ahead, self._tokens_at(batch, layer))

    def compute_experts(self, batch: int, layer: int, slots: Mapping[int, int]) -> float:
        """See `Backend.compute_experts`."""
        start = perf_counter()
        tokens = self._tokens_at(batch, layer)
        status = self._experts.compute(self._backend, self._number(batch), layer, tokens, slots)
        _check(status, f"experts of layer {layer}")
        return perf_counter() - start

    def logits(self, batch: int) -> Floats:
        """See `Backend.logits`."""
        rows, vocab = len(self._inputs[batch].batch.outputs), self._model.config.vocab_size
        result = np.empty((rows, vocab), dtype=np.float32)
        values, start = self._logits[self._logits_offsets[batch] :], 0
        for name in self._head_names():
            width = self._model.matrices[name].shape[0]
            result[:, start : start + width] = values[rows * start : rows * (start + width)].reshape(rows, width)
            start += width
        return result

    def cached_rows(self, layer: int, start: int, stop: int) -> Bytes:
        """See `Backend.cached_rows`."""
        rows: Bytes = self._cache.rows(layer, start, stop).copy()
        return rows

    def restore_rows(self, layer: int, start: int, rows: Bytes) -> None:
        """See `Backend.restore_rows`."""
        self._cache.rows(layer, start, start + rows.shape[1])[:] = rows

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """See `Backend.set_cancel`. ggml looks between the nodes of a graph."""
        self._cancel = cancel  # ggml keeps the address of its flag
        callback, flag = (
            (AbortCallback(), None) if cancel is None else (self._lib.is_set, ctypes.addressof(cancel.flag))
        )
        self._lib.ggml_backend_cpu_set_abort_callback(self._backend, callback, flag)

    def close(self) -> None:
        """See `Backend.close`."""
        if not self._backend:
            return
        for workspace in (self._few, *self._prompts):
            workspace.release()
        self._experts.close()
        self._weights.close()
        self._cache.close()
        self._anchor.close()
        self._lib.ggml_backend_free(self._backend)
        self._backend = 0

    def _open_backend(self) -> int:
        backend: int = self._lib.ggml_backend_cpu_init()
        self._lib.ggml_backend_cpu_set_n_threads(backend, self._threads)
        return backend

    # ---- graphs

    def _graph_for(self, batch: int) -> Graph:
        inputs, number = self._inputs[batch], self._number(batch)
        workspace = self._workspace(number)
        key = (inputs.batch.num_tokens, inputs.kv_length, len(inputs.batch.outputs))
        graph = workspace.get(key)
        if graph is None:
            graph = self._build(inputs, number)
            workspace.add(key, graph)
        return graph

    def _number(self, batch: int) -> int:
        """Of the workspace that computes the batch: 0 for passes of a few tokens, then the micro-batches of prompts."""
        few = len(self._inputs) == 1 and self._inputs[0].batch.num_tokens <= FEW_TOKENS
        return 0 if few else batch + 1

    def _workspace(self, number: int) -> Workspace[Graph]:
        if number == 0:
            return self._few
        while len(self._prompts) < number:
            self._prompts.append(Workspace(self._lib))
        return self._prompts[number - 1]

    def _tokens_at(self, batch: int, layer: int) -> int:
        """How many of the batch's tokens reach a layer's experts."""
        inputs = self._inputs[batch]
        return len(inputs.batch.outputs) if layer == self._model.config.num_layers - 1 else inputs.batch.num_tokens

    def _forget_graphs(self) -> None:
        for workspace in (self._few, *self._prompts):
            workspace.forget()

    def _build(self, inputs: BatchInputs, number: int) -> Graph:
        lib, model, workspace = self._lib, self._model, self._workspace(number)
        stages = model.stages if inputs.batch.outputs else model.stages[: model.first_output_stage]
        looks = self._experts.foresight.looks(inputs.batch.num_tokens)
        context, graph = self._empty_graph(
            TENSORS_PER_STAGE * (len(stages) * (1 + looks) + 1)
            + self._weights.num_parts
            + TENSORS_PER_HEAD * num_tables(model, len(self._tables))
        )
        leaves, outputs = self._leaves(context, inputs), len(inputs.outputs)
        tokens, hidden_size = inputs.batch.num_tokens, model.config.hidden_size
        hidden = lib.ggml_new_tensor_2d(context, F32.ggml_id, hidden_size, tokens)
        cells = {name: self._anchor(getattr(leaves, name)) for name in ("positions", "rows", "outputs")}
        masks = {window: self._anchor(tensor) for window, tensor in leaves.masks.items()}
        hidden_cell = self._anchor(hidden)
        cutter = Cutter(lib, context, graph, self._weights.forms)
        ops = GgmlOps(
            lib, context, graph,
            weight=self._weights.tensor, out_features=lambda name: model.matrices[name].shape[-2],
            on_linear=cutter.note, kv=self._cache.layers, inputs=leaves, num_outputs=outputs, kv_length=inputs.kv_length,
            experts=self._experts.recorder(number, graph, cutter.end_piece),
            streamed=self._tables.keys(), on_attention=cutter.note_attention,
        )  # fmt: skip
        x = Node(hidden, (tokens, hidden_size), hidden_size * 4)
        logits = []
        for stage in stages:
            if stage.routes:
                for ahead, router in enumerate(model.routers_behind(stage.layer, looks), 1):
                    router.foresee(ops, x, ahead)
            result = stage.forward(ops, x)
            if stage.layer < 0:
                logits.append(self._result(graph, result))
            else:
                x = result
        lib.ggml_build_forward_expand(graph, x.tensor)
        workspace.allocate(graph)
        tables: dict[BlockKey, tuple[Moving, ...]] = {}

        def nodes_of(one: Attended, head: int) -> Sequence[int]:
            made = head_nodes(lib, context, one, self._cache.form, head)
            tables[self._tables[one.layer][head]] = made.cells
            return made.nodes

        contexts, pieces = cutter.cut(self._weights.part_tensor, self._weights.part, nodes_of)
        return Graph((context, *contexts), pieces, cells, masks, hidden_cell, logits, cutter.followers, tables)

    def _empty_graph(self, capacity: int) -> tuple[int, int]:
        """A context for `capacity` tensors, and a graph in it."""
        lib = self._lib
        context = lib.context(
            capacity * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(capacity, False) + 4096
        )
        return context, lib.ggml_new_graph_custom(context, capacity, False)

    def _leaves(self, context: int, inputs: BatchInputs) -> GraphInputs:
        lib, tokens = self._lib, inputs.batch.num_tokens
        return GraphInputs(
            positions=lib.ggml_new_tensor_1d(context, I32, tokens),
            rows=lib.ggml_new_tensor_1d(context, I64, tokens),
            outputs=lib.ggml_new_tensor_1d(context, I32, len(inputs.outputs)),
            masks={
                window: lib.ggml_new_tensor_2d(context, F16.ggml_id, inputs.kv_length, tokens)
                for window in self._windows
            },
        )

    def _result(self, graph: int, node: Node) -> ctypes.c_uint64:
        cell = self._anchor(node.tensor)
        self._lib.ggml_build_forward_expand(graph, node.tensor)
        return cell

    def _point(self, graph: Graph, batch: int) -> None:
        inputs = self._inputs[batch]
        for name, cell in graph.inputs.items():
            cell.value = inputs.addresses[name]
        for window, cell in graph.masks.items():
            cell.value = inputs.mask_addresses[window]
        graph.hidden.value = self._hidden.ctypes.data + self._offsets[batch]
        outputs, start = len(inputs.batch.outputs), 0
        for cell, name in zip(graph.logits, self._head_names(), strict=False):
            cell.value = self._logits.ctypes.data + 4 * (self._logits_offsets[batch] + outputs * start)
            start += self._model.matrices[name].shape[0]
        for follower in graph.followers:
            follower.cell.value = follower.leader.value + follower.offset

    def _head_names(self) -> list[str]:
        return [name for stage in self._model.stages[-self._model.head_parts :] for name in stage.matrices]


def _check(status: int, what: str) -> None:
    """
    Raises:
        Cancelled, BackendError: ggml did not end well.
    """
    if status == STATUS_ABORTED:
        raise Cancelled("cancelled")
    if status != STATUS_SUCCESS:
        raise BackendError(f"ggml: {what} failed with status {status}")
