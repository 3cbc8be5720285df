"""`Ops` that records a ggml graph instead of computing: handles are nodes, results exist when the graph has run.

The order of operations is llama.cpp's, so that the same file gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate
from typing import NamedTuple, Protocol

from offload.elements import F32
from offload.kernels.ggml.experts import expert_nodes
from offload.kernels.ggml.library import (
    FLOAT_BYTES,
    HINT_HADAMARD,
    PREC_F32,
    ROPE_HALVES,
    ROPE_INTERLEAVED,
    Library,
)
from offload.kernels.ggml.rotation import Rotation
from offload.kernels.ggml.routing import Choice, Recorder
from offload.kernels.ggml.table_attention import Attended
from offload.kernels.ops import Activation, Attention, Rope, Routing
from offload.models.base import ExpertLayer


class Node(NamedTuple):
    """A float32 tensor of the graph. `shape` is outermost first; the last dimension is contiguous."""

    tensor: int
    shape: tuple[int, ...]
    row_nbytes: int  # distance between consecutive tokens


class KVTensors(NamedTuple):
    """Key and value cache of a layer, each [num_kv_heads, ctx, features of a head], and how far apart rows and heads lie.

    `value` is None where values are the leading features of keys. Rotations are of what is stored, None where it is not.
    """

    key: int
    value: int | None
    row_nbytes: int
    head_nbytes: int
    key_rotation: Rotation | None = None
    value_rotation: Rotation | None = None


class GraphInputs(NamedTuple):
    """Leaf tensors of a graph whose data is set before each run. `masks` maps a window to its mask [tokens, kv]."""

    positions: int
    rows: int
    outputs: int
    masks: Mapping[int | None, int]


class Experts(Protocol):
    """What a graph needs to know of experts."""

    def layer(self, layer: int) -> ExpertLayer: ...

    def resident(self, layer: int) -> tuple[int, int, int] | None:
        """Tensors [num_experts, rows, columns] of the layer's gate, up and down; None where experts have to be brought."""
        ...

    def keep(self, layer: int, choice: Choice, *, x: bool) -> None:
        """Puts the numbers of the chosen experts, and what those get, where they can be read after the piece."""
        ...

    @property
    def width(self) -> int:
        """How many experts a guess of a later choice names."""
        ...

    def keep_foreseen(self, layer: int, ahead: int, ids: int) -> None:
        """Puts such a guess, int32 [num_tokens, width], where it can be read after the piece."""
        ...

    def keep_weights(self, weights: int) -> None:
        """Puts the weights of the choice, float32 [num_tokens, num_used], where they can be read after the piece."""
        ...

    def returned(self, tensor: int) -> None:
        """Lets a tensor [num_tokens, num_used, hidden_size] read what the experts returned."""
        ...

    def end_piece(self) -> None:
        """The graph is cut here."""
        ...


class GgmlOps:
    """Records one graph. `weight(name)` gives the ggml tensor of a matrix or vector, `out_features(name)` its rows,
    `kv[layer]` the caches; `on_linear(name, product, factor, num_tokens)` is told every product with a matrix, and
    `on_attention` every attention of the layers in `streamed`, whose tables pass through a ring."""

    def __init__(
        self,
        library: Library,
        context: int,
        graph: int,
        *,
        weight: Callable[[str], int],
        out_features: Callable[[str], int],
        on_linear: Callable[[str, int, int, int], None],
        kv: Sequence[KVTensors],
        inputs: GraphInputs,
        num_outputs: int,
        kv_length: int,
        experts: Experts | None = None,
        streamed: AbstractSet[int] = frozenset(),
        on_attention: Callable[[Attended], None] = lambda _: None,
    ) -> None:
        self._lib = library
        self._ctx = context
        self._graph = graph
        self._weight = weight
        self._out_features = out_features
        self._on_linear = on_linear
        self._kv = kv
        self._inputs = inputs
        self._num_outputs = num_outputs
        self._kv_length = kv_length
        self._experts_or_none = experts
        self._streamed = streamed
        self._on_attention = on_attention
        self._recorder = Recorder(library, context, graph)
        self._choices: dict[int, Choice] = {}
        self._latest = 0

    def linear(self, x: Node, weight: str, bias: str | None = None) -> Node:
        """[num_tokens, in_features] -> [num_tokens, out_features]."""
        tensor = self._lib.ggml_mul_mat(self._ctx, self._weight(weight), x.tensor)
        self._on_linear(weight, tensor, x.tensor, x.shape[0])
        if bias is not None:
            tensor = self._lib.ggml_add(self._ctx, tensor, self._weight(bias))
        return self._dense(tensor, (x.shape[0], self._out_features(weight)))

    def rms_norm(self, x: Node, weight: str | None, eps: float) -> Node:
        """Norm over the last dimension, times `weight`."""
        tensor = self._lib.ggml_rms_norm(self._ctx, x.tensor, eps)
        if weight is not None:
            tensor = self._lib.ggml_mul(self._ctx, tensor, self._weight(weight))
        return self._dense(tensor, x.shape)

    def add(self, a: Node, b: Node) -> Node:
        """Elementwise sum."""
        return self._dense(self._lib.ggml_add(self._ctx, a.tensor, b.tensor), a.shape)

    def scale(self, x: Node, factor: float) -> Node:
        """`x * factor`."""
        return self._dense(self._lib.ggml_scale(self._ctx, x.tensor, factor), x.shape)

    def softcap(self, x: Node, cap: float) -> Node:
        """`cap * tanh(x / cap)`."""
        return self.scale(self._dense(self._lib.ggml_tanh(self._ctx, self.scale(x, 1 / cap).tensor), x.shape), cap)

    def split(self, x: Node, sizes: Sequence[int]) -> tuple[Node, ...]:
        """Slices of the last dimension, as views."""
        return tuple(self._slice(x, end - size, size) for size, end in zip(sizes, accumulate(sizes), strict=True))

    def _slice(self, x: Node, start: int, size: int) -> Node:
        offset = start * FLOAT_BYTES
        if len(x.shape) == 2:
            view = self._lib.ggml_view_2d(self._ctx, x.tensor, size, x.shape[0], x.row_nbytes, offset)
            return Node(view, (x.shape[0], size), x.row_nbytes)
        num_tokens, num_heads, features = x.shape
        view = self._lib.ggml_view_3d(
            self._ctx, x.tensor, size, num_heads, num_tokens, features * FLOAT_BYTES, x.row_nbytes, offset
        )
        return Node(view, (num_tokens, num_heads, size), x.row_nbytes)

    def concat(self, a: Node, b: Node) -> Node:
        """Both copied side by side; one head of `b` serves all of `a`."""
        lib, (num_tokens, num_heads, first), second = self._lib, a.shape, b.shape[-1]
        tail = b.tensor
        if b.shape[1] != num_heads:
            tail = lib.ggml_repeat_4d(self._ctx, tail, second, num_heads, num_tokens, 1)
        return self._dense(lib.ggml_concat(self._ctx, a.tensor, tail, 0), (num_tokens, num_heads, first + second))

    def linear_heads(self, x: Node, weight: str) -> Node:
        """One product over all heads, with the heads outermost."""
        lib, (num_tokens, num_heads, _) = self._lib, x.shape
        factor = lib.ggml_permute(self._ctx, x.tensor, 0, 2, 1, 3)
        product = lib.ggml_mul_mat(self._ctx, self._weight(weight), factor)
        self._on_linear(weight, product, factor, num_tokens)
        tensor = lib.ggml_cont(self._ctx, lib.ggml_permute(self._ctx, product, 0, 2, 1, 3))
        return self._dense(tensor, (num_tokens, num_heads, self._out_features(weight)))

    def flat(self, x: Node) -> Node:
        """[num_tokens, features], a view of heads without gaps."""
        num_tokens, num_heads, dim = x.shape
        tensor = self._lib.ggml_reshape_2d(self._ctx, x.tensor, num_heads * dim, num_tokens)
        return self._dense(tensor, (num_tokens, num_heads * dim))

    def heads(self, x: Node, num_heads: int) -> Node:
        """[num_tokens, features] -> [num_tokens, num_heads, head_dim], a view."""
        num_tokens, features = x.shape
        dim = features // num_heads
        view = self._lib.ggml_view_3d(
            self._ctx, x.tensor, dim, num_heads, num_tokens, dim * FLOAT_BYTES, x.row_nbytes, 0
        )
        return Node(view, (num_tokens, num_heads, dim), x.row_nbytes)

    def rope(self, x: Node, rope: Rope) -> Node:
        """Rotation by the batch's positions."""
        tensor = self._lib.ggml_rope_ext(
            self._ctx,
            x.tensor,
            self._inputs.positions,
            self._weight(rope.factors) if rope.factors is not None else None,
            rope.dims,
            ROPE_INTERLEAVED if rope.interleaved else ROPE_HALVES,
            0,  # original context: only YaRN reads it
            rope.theta,
            rope.frequency_scale,
            0.0,  # no YaRN extrapolation
            rope.magnitude,
            32.0,
            1.0,
        )
        return self._dense(tensor, x.shape)

    def attention(self, query: Node, key: Node, value: Node, attention: Attention) -> Node:
        """Stores key and value, then flash attention over the first `kv_length` positions of the layer's cache."""
        lib, ctx, cache = self._lib, self._ctx, self._kv[attention.layer]
        query, key = self._rotated(query, cache.key_rotation), self._rotated(key, cache.key_rotation)
        stored = value if cache.value is None else self._rotated(value, cache.value_rotation)
        streamed = attention.layer in self._streamed
        for node in (query, key, stored) if streamed else ():
            lib.ggml_build_forward_expand(self._graph, node.tensor)
        first = lib.ggml_graph_n_nodes(self._graph)
        self._store(cache.key, key)
        if cache.value is not None:
            self._store(cache.value, stored)
        (num_tokens, num_heads, _), dim = query.shape, value.shape[-1]
        tensor = lib.ggml_flash_attn_ext(
            ctx,
            lib.ggml_permute(ctx, query.tensor, 0, 2, 1, 3),
            self._cached(cache, cache.key, key.shape),
            self._cached(cache, cache.key if cache.value is None else cache.value, value.shape),
            self._inputs.masks[attention.window],
            attention.scale,
            0.0,  # no ALiBi
            attention.softcap or 0.0,
        )
        if attention.sinks is not None:
            lib.ggml_flash_attn_ext_add_sinks(tensor, self._weight(attention.sinks))
        lib.ggml_prec_set_acc(tensor, PREC_F32)
        if streamed:
            lib.ggml_build_forward_expand(self._graph, tensor)
            for fresh in (key, stored):  # never computed: their memory is not given away before the last head is stored
                lib.ggml_build_forward_expand(self._graph, lib.ggml_sum_rows(ctx, fresh.tensor))
            self._on_attention(
                Attended(
                    layer=attention.layer, first=first, end=lib.ggml_graph_n_nodes(self._graph), query=query.tensor,
                    key=key.tensor, value=stored.tensor, whole=tensor, rows=self._inputs.rows,
                    mask=self._inputs.masks[attention.window],
                    sinks=None if attention.sinks is None else self._weight(attention.sinks), scale=attention.scale,
                    softcap=attention.softcap or 0.0, num_tokens=num_tokens, num_heads=num_heads,
                    num_kv_heads=key.shape[1], kv_length=self._kv_length,
                )
            )  # fmt: skip
        return self.flat(self._rotated(self._dense(tensor, (num_tokens, num_heads, dim)), cache.value_rotation))

    def glu(self, gate: Node, up: Node, activation: Activation) -> Node:
        """`activation(gate) * up` in one kernel."""
        return self._dense(self._lib.gated_unit(self._ctx, gate.tensor, up.tensor, activation), gate.shape)

    def sigmoid_gate(self, x: Node, gate: Node) -> Node:
        """`x * sigmoid(gate)`, one factor for each token."""
        factor = self._lib.ggml_sigmoid(self._ctx, gate.tensor)
        return self._dense(self._lib.ggml_mul(self._ctx, x.tensor, factor), x.shape)

    def route(self, x: Node, routing: Routing) -> None:
        """Ends a piece with the choice, where experts have to be brought."""
        products = self.linear(x, routing.router, routing.bias)
        bias = None if routing.selection_bias is None else self._weight(routing.selection_bias)
        choice = self._recorder.choose(x.tensor, products.tensor, bias, routing, x.shape[0])
        is_resident = self._experts.resident(routing.layer) is not None
        self._experts.keep(routing.layer, choice, x=not is_resident)
        self._choices[routing.layer] = choice
        self._latest = choice.weights
        if not is_resident:
            self._experts.keep_weights(self._recorder.copied(choice.weights))
            self._experts.end_piece()

    def foresee(self, x: Node, routing: Routing, ahead: int) -> None:
        """Keeps the guess; part of the piece that ends with the choice of the layer at hand."""
        products = self.linear(x, routing.router, routing.bias)
        bias = None if routing.selection_bias is None else self._weight(routing.selection_bias)
        width, tokens = min(self._experts.width, routing.num_experts), x.shape[0]
        ids = self._recorder.rank(products.tensor, bias, routing, width, tokens)
        self._experts.keep_foreseen(routing.layer, ahead, ids)

    def mix(self, layer: int) -> Node:
        """Begins a piece with what the experts returned, where they had to be brought; else computes them here."""
        choice, experts = self._choices.pop(layer), self._experts.layer(layer)
        hidden_size, tokens = experts.experts[0].down.shape[0], choice.num_tokens
        resident = self._experts.resident(layer)
        if resident is None:
            self._lib.ggml_build_forward_expand(self._graph, self._latest)  # what does not wait for them comes before
            self._experts.end_piece()
            returned = self._lib.ggml_new_tensor_3d(self._ctx, F32.ggml_id, hidden_size, experts.num_used, tokens)
            self._experts.returned(returned)
        else:
            returned = self._compute(resident, choice, experts, hidden_size)
        mixed = self._recorder.mix(returned, choice.weights, hidden_size, experts.num_used, tokens)
        return self._dense(mixed, (tokens, hidden_size))

    @property
    def _experts(self) -> Experts:
        assert self._experts_or_none is not None, "a graph without experts"
        return self._experts_or_none

    def _compute(self, matrices: tuple[int, int, int], choice: Choice, layer: ExpertLayer, hidden_size: int) -> int:
        x = self._lib.ggml_reshape_3d(self._ctx, choice.x, hidden_size, 1, choice.num_tokens)
        biases = None if layer.biases is None else [self._weight(name) for name in layer.biases]
        return expert_nodes(self._lib, self._ctx, layer.activation, matrices, x, choice.ids, biases, choice.ids)

    def output_rows(self, x: Node) -> Node:
        """The rows whose logits are wanted."""
        tensor = self._lib.ggml_get_rows(self._ctx, x.tensor, self._inputs.outputs)
        return self._dense(tensor, (self._num_outputs, x.shape[1]))

    def _rotated(self, x: Node, rotation: Rotation | None) -> Node:
        """[num_tokens, num_heads, dim], each `order` features of a head rotated."""
        if rotation is None:
            return x
        lib, ctx, (num_tokens, num_heads, dim) = self._lib, self._ctx, x.shape
        is_dense = x.row_nbytes == num_heads * dim * FLOAT_BYTES
        tensor = x.tensor if is_dense else lib.ggml_cont(ctx, x.tensor)
        groups = num_tokens * num_heads * dim // rotation.order
        product = lib.ggml_mul_mat(ctx, rotation.tensor, lib.ggml_reshape_2d(ctx, tensor, rotation.order, groups))
        lib.ggml_mul_mat_set_hint(product, HINT_HADAMARD)
        return self._dense(lib.ggml_reshape_3d(ctx, product, dim, num_heads, num_tokens), x.shape)

    def _store(self, cache: int, fresh: Node) -> None:
        by_head = self._lib.ggml_permute(self._ctx, fresh.tensor, 0, 2, 1, 3)
        stored = self._lib.ggml_set_rows(self._ctx, cache, by_head, self._inputs.rows)
        self._lib.ggml_build_forward_expand(self._graph, stored)  # before the attention node that reads the cache

    def _cached(self, cache: KVTensors, tensor: int, shape: tuple[int, ...]) -> int:
        """The leading features of a cache's positions as [num_kv_heads, kv_length, dim], a view."""
        _, num_heads, dim = shape
        view: int = self._lib.ggml_view_3d(
            self._ctx, tensor, dim, self._kv_length, num_heads, cache.row_nbytes, cache.head_nbytes, 0
        )
        return view

    def _dense(self, tensor: int, shape: tuple[int, ...]) -> Node:
        self._latest = tensor
        row = FLOAT_BYTES
        for size in shape[1:]:
            row *= size
        return Node(tensor, shape, row)
