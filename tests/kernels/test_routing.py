"""Choosing experts, weighing them and mixing what they return: both backends against the definition, in numpy."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from support.ggml_leaves import Leaves

from offload.kernels.ggml.routing import Recorder
from offload.kernels.ggml.workspace import Workspace
from offload.kernels.ops import Routing
from offload.kernels.torch.routing import choose, rank

Array = np.ndarray[Any, Any]
EXPERTS, HIDDEN, TOKENS = 12, 8, 7
PLAIN = Routing(layer=0, router="router", num_experts=EXPERTS, num_used=3)
KINDS = {
    "softmax": PLAIN,
    "softmax, normalised": Routing(layer=0, router="router", num_experts=EXPERTS, num_used=3, normalise=True),
    "softmax of the chosen": Routing(
        layer=0, router="router", num_experts=EXPERTS, num_used=4, scoring="softmax_of_chosen"
    ),
    "sigmoid, biased, scaled": Routing(
        layer=0, router="router", num_experts=EXPERTS, num_used=3, scoring="sigmoid", selection_bias="shift",
        normalise=True, scale=2.5,
    ),
    "two of three groups": Routing(
        layer=0, router="router", num_experts=EXPERTS, num_used=3, scoring="sigmoid", selection_bias="shift",
        num_groups=3, groups_used=2, group_top=2, normalise=True,
    ),
    "one of four groups, by its best": Routing(
        layer=0, router="router", num_experts=EXPERTS, num_used=2, num_groups=4, groups_used=1, group_top=1
    ),
}  # fmt: skip
kinds = pytest.mark.parametrize("routing", KINDS.values(), ids=KINDS)


@pytest.fixture
def numbers() -> dict[str, Array]:
    random = np.random.default_rng(3)
    x, router = (
        random.standard_normal((TOKENS, HIDDEN), np.float32),
        random.standard_normal((EXPERTS, HIDDEN), np.float32),
    )
    return {
        "x": x,
        "router": router,
        "products": x @ router.T,
        "shift": random.standard_normal(EXPERTS).astype(np.float32),
    }


def reference(numbers: dict[str, Array], routing: Routing) -> tuple[Array, Array, Array]:
    """Chosen experts, their weights, and all experts in the order in which they are compared; one token at a time."""
    chosen, weights, orders = [], [], []
    for products in numbers["products"].astype(np.float64):
        scores = products
        if routing.scoring == "softmax":
            scores = np.exp(products - products.max()) / np.exp(products - products.max()).sum()
        elif routing.scoring == "sigmoid":
            scores = 1 / (1 + np.exp(-products))
        compared = scores + (numbers["shift"] if routing.selection_bias else 0)
        groups = compared.reshape(routing.num_groups, -1)
        worth = np.sort(groups, axis=-1)[:, ::-1][:, : routing.group_top].sum(-1)
        inside = np.zeros(routing.num_groups, bool)
        inside[np.argsort(-worth)[: routing.groups_used]] = True
        if routing.num_groups > 1:
            compared = np.where(np.repeat(inside, groups.shape[1]), compared, -np.inf)
        order = np.argsort(-compared, kind="stable")
        best = order[: routing.num_used]
        weight = scores[best]
        if routing.scoring == "softmax_of_chosen":
            weight = np.exp(weight - weight.max()) / np.exp(weight - weight.max()).sum()
        if routing.normalise:
            weight = weight / weight.sum()
        chosen.append(best)
        weights.append(weight * routing.scale)
        orders.append(order)
    return np.array(chosen), np.array(weights), np.array(orders)


@kinds
def test_torch_chooses_and_ranks_as_defined(numbers: dict[str, Array], routing: Routing, device: str) -> None:
    tensors = {name: torch.from_numpy(values).to(device) for name, values in numbers.items()}
    chosen, weights, orders = reference(numbers, routing)
    routed = choose(tensors["x"], routing, tensors.__getitem__)
    assert np.array_equal(routed.experts.cpu().numpy(), chosen)
    np.testing.assert_allclose(routed.weights.cpu().numpy(), weights, rtol=1e-5, atol=1e-6)
    width = EXPERTS * routing.groups_used // routing.num_groups
    assert np.array_equal(rank(tensors["x"], routing, tensors.__getitem__)[:, :width].cpu().numpy(), orders[:, :width])


class Graph:
    """One graph of the recorder's nodes over arrays."""

    def __init__(self, leaves: Leaves) -> None:
        self.leaves, lib = leaves, leaves.lib
        self.context = lib.context(256 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(256, False))
        self.graph = lib.ggml_new_graph_custom(self.context, 256, False)
        self.recorder = Recorder(lib, self.context, self.graph)

    def leaf(self, array: Array) -> int:
        return self.leaves.leaf(self.context, array)

    def run(self, *tensors: int) -> list[int]:
        """Addresses of copies of the tensors, once computed."""
        lib = self.leaves.lib
        copies = [lib.ggml_cont(self.context, tensor) for tensor in tensors]
        for copy in copies:
            lib.ggml_set_output(copy)
            lib.ggml_build_forward_expand(self.graph, copy)
        self.workspace = Workspace(lib)
        self.workspace.allocate(self.graph)
        assert lib.ggml_backend_graph_compute(self.leaves.backend, self.graph) == 0
        return [lib.ggml_get_data(copy) for copy in copies]

    def close(self) -> None:
        self.workspace.release()
        self.leaves.lib.ggml_free(self.context)


@pytest.fixture(scope="module")
def leaves() -> Iterator[Leaves]:
    made = Leaves()
    yield made
    made.close()


@pytest.fixture
def graph(leaves: Leaves) -> Iterator[Graph]:
    made = Graph(leaves)
    yield made
    made.close()


def read(address: int, kind: Any, *shape: int) -> Array:
    return np.ctypeslib.as_array((kind * math.prod(shape)).from_address(address)).reshape(shape).copy()


@kinds
def test_ggml_chooses_as_defined(graph: Graph, numbers: dict[str, Array], routing: Routing) -> None:
    shift = graph.leaf(numbers["shift"]) if routing.selection_bias else None
    choice = graph.recorder.choose(graph.leaf(numbers["x"]), graph.leaf(numbers["products"]), shift, routing, TOKENS)
    ids, weights = graph.run(choice.ids, choice.weights)
    chosen, expected, _ = reference(numbers, routing)
    assert np.array_equal(read(ids, ctypes.c_int32, *chosen.shape), chosen)
    np.testing.assert_allclose(read(weights, ctypes.c_float, *chosen.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "count"), list(product(["softmax", "sigmoid, biased, scaled"], [1, 5, EXPERTS])))
def test_ggml_ranks_as_defined(graph: Graph, numbers: dict[str, Array], name: str, count: int) -> None:
    routing = KINDS[name]
    shift = graph.leaf(numbers["shift"]) if routing.selection_bias else None
    (ids,) = graph.run(graph.recorder.rank(graph.leaf(numbers["products"]), shift, routing, count, TOKENS))
    assert np.array_equal(read(ids, ctypes.c_int32, TOKENS, count), reference(numbers, routing)[2][:, :count])


@pytest.mark.parametrize("used", [1, 2, 5])
def test_what_experts_return_is_weighed_and_added_in_order(graph: Graph, used: int) -> None:
    random = np.random.default_rng(used)
    returned = random.standard_normal((TOKENS, used, HIDDEN), np.float32)
    weights = random.random((TOKENS, used)).astype(np.float32)
    lib, expected = graph.leaves.lib, weights[:, :1] * returned[:, 0]
    for place in range(1, used):
        expected = expected + weights[:, place : place + 1] * returned[:, place]
    shaped: Callable[..., int] = lib.ggml_reshape_3d
    tensors = (
        shaped(graph.context, graph.leaf(returned.reshape(-1, HIDDEN)), HIDDEN, used, TOKENS),
        shaped(graph.context, graph.leaf(weights), 1, used, TOKENS),
    )
    (mixed,) = graph.run(graph.recorder.mix(*tensors, HIDDEN, used, TOKENS))
    assert np.array_equal(read(mixed, ctypes.c_float, TOKENS, HIDDEN), expected)
