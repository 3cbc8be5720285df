"""Choosing experts and mixing what they return, recorded as nodes of a graph in llama.cpp's order."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from offload.kernels.ggml.library import FLOAT_BYTES, Library
from offload.kernels.ops import Routing

SMALLEST_SUM: Final = 2.0**-14  # the smallest normal half-precision number, by which llama.cpp keeps a division sane


class Choice(NamedTuple):
    """Tensors of a layer's routing: what the experts get, their numbers [num_tokens, num_used], and their weights
    [num_tokens, num_used, 1]."""

    x: int
    ids: int
    weights: int
    num_tokens: int


class Recorder:
    """Records into one graph."""

    def __init__(self, library: Library, context: int, graph: int) -> None:
        self._lib = library
        self._ctx = context
        self._graph = graph

    def choose(self, x: int, products: int, selection_bias: int | None, routing: Routing, num_tokens: int) -> Choice:
        """From the router's products [num_tokens, num_experts] to a choice, in the graph."""
        lib, ctx, used = self._lib, self._ctx, routing.num_used
        scores = self._scores(products, routing)
        ids = self._best(scores, selection_bias, routing, used, num_tokens)
        scores = lib.ggml_reshape_3d(ctx, scores, 1, routing.num_experts, num_tokens)
        weights = lib.ggml_reshape_2d(ctx, lib.ggml_get_rows(ctx, scores, ids), used, num_tokens)
        if routing.scoring == "softmax_of_chosen":
            weights = lib.ggml_soft_max(ctx, weights)
        if routing.normalise:
            total = lib.ggml_clamp(ctx, lib.ggml_sum_rows(ctx, weights), SMALLEST_SUM, math.inf)
            weights = lib.ggml_div(ctx, weights, total)
        if routing.scale != 1.0:
            weights = lib.ggml_scale(ctx, weights, routing.scale)
        weights = lib.ggml_reshape_3d(ctx, weights, 1, used, num_tokens)
        lib.ggml_build_forward_expand(self._graph, weights)
        return Choice(x, ids, weights, num_tokens)

    def copied(self, tensor: int) -> int:
        """A copy of a tensor, in the graph."""
        copy = int(self._lib.ggml_cont(self._ctx, tensor))
        self._lib.ggml_build_forward_expand(self._graph, copy)
        return copy

    def rank(self, products: int, selection_bias: int | None, routing: Routing, count: int, num_tokens: int) -> int:
        """The `count` best experts in order, int32 [num_tokens, count], in the graph."""
        ids = self._best(self._scores(products, routing), selection_bias, routing, count, num_tokens)
        self._lib.ggml_build_forward_expand(self._graph, ids)
        return ids

    def mix(self, returned: int, weights: int, hidden_size: int, num_used: int, num_tokens: int) -> int:
        """The weighted sum of what the experts returned, [num_tokens, num_used, hidden_size], in the order of the choice."""
        lib, ctx = self._lib, self._ctx
        weighted = lib.ggml_mul(ctx, returned, weights)
        lib.ggml_build_forward_expand(self._graph, weighted)
        row = hidden_size * FLOAT_BYTES
        views = [
            lib.ggml_view_2d(ctx, weighted, hidden_size, num_tokens, num_used * row, rank * row)
            for rank in range(num_used)
        ]
        total: int = views[0] if num_used > 1 else lib.ggml_cont(ctx, views[0])
        for view in views[1:]:
            total = lib.ggml_add(ctx, total, view)
        return total

    def _best(self, scores: int, selection_bias: int | None, routing: Routing, count: int, num_tokens: int) -> int:
        lib, ctx = self._lib, self._ctx
        compared = scores if selection_bias is None else lib.ggml_add(ctx, scores, selection_bias)
        if routing.num_groups > 1:
            compared = self._best_groups(compared, routing, num_tokens)
        return int(lib.ggml_cont(ctx, lib.ggml_argsort_top_k(ctx, compared, count)))

    def _scores(self, products: int, routing: Routing) -> int:
        score = {"softmax": self._lib.ggml_soft_max, "sigmoid": self._lib.ggml_sigmoid}.get(routing.scoring)
        return products if score is None else int(score(self._ctx, products))

    def _best_groups(self, scores: int, routing: Routing, num_tokens: int) -> int:
        """The scores, with those outside of the best groups at minus infinity."""
        lib, ctx, groups, top = self._lib, self._ctx, routing.num_groups, routing.group_top
        each = routing.num_experts // groups
        grouped = lib.ggml_reshape_3d(ctx, scores, each, groups, num_tokens)
        best = lib.ggml_argsort_top_k(ctx, grouped, top)
        values = lib.ggml_get_rows(ctx, lib.ggml_reshape_4d(ctx, grouped, 1, each, groups, num_tokens), best)
        sums = lib.ggml_sum_rows(ctx, lib.ggml_reshape_3d(ctx, values, top, groups, num_tokens))
        chosen = lib.ggml_argsort_top_k(ctx, lib.ggml_reshape_2d(ctx, sums, groups, num_tokens), routing.groups_used)
        inside = lib.ggml_get_rows(ctx, grouped, chosen)
        masked = lib.ggml_set_rows(ctx, lib.ggml_fill(ctx, grouped, -math.inf), inside, chosen)
        return int(lib.ggml_reshape_2d(ctx, masked, routing.num_experts, num_tokens))
