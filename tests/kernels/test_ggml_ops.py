"""Each operation that `GgmlOps` records, run as a graph of its own, against its definition in float64."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.ggml_leaves import Leaves
from support.ropes import ropes

from offload.elements import F16, F32, ElementType, kv_types
from offload.kernels.batch import MicroBatch
from offload.kernels.ggml.cache import KVCache, cache_nbytes
from offload.kernels.ggml.dequantize import dequantize
from offload.kernels.ggml.inputs import BatchInputs, bucket
from offload.kernels.ggml.ops import GgmlOps, GraphInputs, KVTensors, Node
from offload.kernels.ggml.workspace import Workspace
from offload.kernels.ops import Activation, Attention
from offload.models.base import ModelConfig
from offload.units import align_up

Array = np.ndarray[Any, Any]
TOKENS, HEADS, KV_HEADS, DIM, CTX = 5, 4, 2, 16, 512
BATCH = MicroBatch(7, TOKENS, (3, 1))
GENERATOR = np.random.default_rng(5)
START = GENERATOR.bit_generator.state


def random(*shape: int) -> Array:
    return GENERATOR.standard_normal(shape, np.float32)


WEIGHTS = {
    "matrix": random(6, DIM),
    "bias": random(6),
    "norm": random(DIM),
    "factors": np.abs(random(DIM // 2)) + np.float32(0.5),
}


class Kernels(Leaves):
    """Makes graphs of single operations over arrays, and runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[str, int, int, int]] = []

    def __call__(
        self,
        record: Callable[..., Node | tuple[Node, ...]],
        *arrays: Array,
        batch: MicroBatch = BATCH,
        caches: Mapping[str, list[Array]] | None = None,
        kv: Sequence[KVTensors] = (),
        window: int | None = None,
    ) -> list[Array]:
        """The results of `record(ops, *nodes)`, where nodes are the arrays, [num_tokens, features] each."""
        lib = self.lib
        context = lib.context(128 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(128, False))
        graph = lib.ggml_new_graph_custom(context, 128, False)
        inputs = BatchInputs(batch, bucket(batch.kv_length, CTX), (window,))
        pairs = zip(caches["key"], caches["value"], strict=True) if caches else ()
        ops = GgmlOps(
            lib, context, graph,
            weight={name: self.leaf(context, values) for name, values in WEIGHTS.items()}.__getitem__,
            out_features=lambda name: WEIGHTS[name].shape[0],
            on_linear=lambda *told: self.products.append(told),
            kv=kv or [KVTensors(*(self.leaf(context, cache) for cache in pair), *pair[0].strides[1::-1]) for pair in pairs],
            inputs=GraphInputs(
                *(self.leaf(context, array) for array in (inputs.positions, inputs.rows, inputs.outputs)),
                masks={window: self.leaf(context, inputs.masks[window])},
            ),
            num_outputs=len(batch.outputs), kv_length=inputs.kv_length,
        )  # fmt: skip
        nodes = [Node(self.leaf(context, array), array.shape, array.shape[1] * 4) for array in arrays]
        recorded = record(ops, *nodes)
        results = (recorded,) if isinstance(recorded, Node) else recorded
        dense = [lib.ggml_cont(context, result.tensor) for result in results]
        for tensor in dense:
            lib.ggml_set_output(tensor)
            lib.ggml_build_forward_expand(graph, tensor)
        workspace = Workspace(lib)
        workspace.allocate(graph)
        assert lib.ggml_backend_graph_compute(self.backend, graph) == 0
        values = [
            np.ctypeslib.as_array((ctypes.c_float * math.prod(result.shape)).from_address(lib.ggml_get_data(tensor)))
            .reshape(result.shape)
            .copy()
            for tensor, result in zip(dense, results, strict=True)
        ]
        workspace.release()
        lib.ggml_free(context)
        return values


@pytest.fixture(autouse=True)
def own_numbers() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    GENERATOR.bit_generator.state = START


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    kernels = Kernels()
    yield kernels
    kernels.close()


def near(actual: Array, expected: Array, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def test_linear_adds_its_bias_and_tells_of_its_product(kernels: Kernels) -> None:
    x = random(TOKENS, DIM)
    kernels.products.clear()
    plain, biased = kernels(lambda ops, x: (ops.linear(x, "matrix"), ops.linear(x, "matrix", "bias")), x)
    near(plain, x.astype(np.float64) @ WEIGHTS["matrix"].T)
    near(biased, plain + WEIGHTS["bias"])
    assert [(name, tokens) for name, _, _, tokens in kernels.products] == [("matrix", TOKENS)] * 2
    products, factors = {told[1] for told in kernels.products}, {told[2] for told in kernels.products}
    assert len(products) == 2 and len(factors) == 1, "each product, and x both times"


def test_rms_norm_works_on_rows_and_on_heads_of_a_slice(kernels: Kernels) -> None:
    def normed(x: Array) -> Array:
        return x / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + 0.25)

    x, wide = random(TOKENS, DIM), random(TOKENS, 3 * DIM)
    plain, weighted = kernels(lambda ops, x: (ops.rms_norm(x, None, 0.25), ops.rms_norm(x, "norm", 0.25)), x)
    near(plain, normed(x))
    near(weighted, normed(x) * WEIGHTS["norm"])
    (heads,) = kernels(lambda ops, x: ops.rms_norm(ops.heads(ops.split(x, [DIM, 2 * DIM])[1], 2), "norm", 0.25), wide)
    near(heads, normed(wide[:, DIM:].reshape(TOKENS, 2, DIM)) * WEIGHTS["norm"])


def test_elementwise_operations_follow_their_definitions(kernels: Kernels) -> None:
    a, b = random(TOKENS, DIM), random(TOKENS, DIM)
    added, scaled, capped = kernels(lambda ops, a, b: (ops.add(a, b), ops.scale(a, -0.5), ops.softcap(a, 0.7)), a, b)
    near(added, a + b, 0, 0)
    near(scaled, a * np.float32(-0.5), 0, 0)
    near(capped, 0.7 * np.tanh(a.astype(np.float64) / 0.7))


def test_slices_heads_and_output_rows_pick_the_right_numbers(kernels: Kernels) -> None:
    x = random(TOKENS, 3 * DIM)
    first, second, third = kernels(lambda ops, x: ops.split(x, [4, 12, 2 * DIM]), x)
    assert np.array_equal(first, x[:, :4]) and np.array_equal(second, x[:, 4:DIM]) and np.array_equal(third, x[:, DIM:])
    nested, rows = kernels(lambda ops, x: (ops.heads(ops.split(x, [DIM, 2 * DIM])[1], 4), ops.output_rows(x)), x)
    assert np.array_equal(nested, x[:, DIM:].reshape(TOKENS, 4, DIM // 2))
    assert np.array_equal(rows, x[[3, 1]])


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu", lambda v: v / (1 + math.exp(-v))),
        ("gelu", lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2),
        ("gelu_tanh", lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2),
    ],
)
def test_glu_with_every_activation(kernels: Kernels, name: Activation, activation: Callable[[float], float]) -> None:
    """Gates are float16 numbers: ggml looks the second gelu up in a table of those. The gelus differ by 1% at -2."""
    gate = (2 * random(TOKENS, 64)).astype(np.float16).astype(np.float32)
    up = random(TOKENS, 64)
    (result,) = kernels(lambda ops, gate, up: ops.glu(gate, up, name), gate, up)
    near(result, np.vectorize(activation)(gate.astype(np.float64)) * up, 6e-4 if name == "gelu_tanh" else 1e-5, 1e-6)


ROPES = ropes(DIM)


@pytest.mark.parametrize("name", ROPES)
def test_rope_turns_pairs_by_position_and_frequency(kernels: Kernels, name: str) -> None:
    rope, start = ROPES[name], 131
    x = random(TOKENS, HEADS * DIM)
    pairs = np.arange(rope.dims // 2)
    first, second = (2 * pairs, 2 * pairs + 1) if rope.interleaved else (pairs, pairs + rope.dims // 2)
    divisors = np.ones(len(pairs)) if rope.factors is None else WEIGHTS["factors"][: len(pairs)].astype(np.float64)
    frequencies = rope.frequency_scale * rope.theta ** (-2 * pairs / rope.dims) / divisors
    turn = rope.magnitude * np.exp(1j * (start + np.arange(TOKENS))[:, None, None] * frequencies)
    expected = x.reshape(TOKENS, HEADS, DIM).astype(np.float64)
    turned = (expected[..., first] + 1j * expected[..., second]) * turn
    expected[..., first], expected[..., second] = turned.real, turned.imag
    batch = MicroBatch(start, TOKENS, (0,))
    (result,) = kernels(lambda ops, x: ops.rope(ops.heads(x, HEADS), rope), x, batch=batch)
    near(result, expected, 1e-4, 1e-4)


def attended(query: Array, keys: Array, values: Array, start: int, attention: Attention) -> Array:
    """Softmax attention in float64: query [tokens, heads, dim] over keys and values [positions, kv_heads, dim]."""
    group = query.shape[1] // keys.shape[1]
    k, v = (np.repeat(past.astype(np.float64), group, axis=1) for past in (keys, values))
    scores = np.einsum("thd,khd->htk", query.astype(np.float64), k) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * np.tanh(scores / attention.softcap)
    distance = start + np.arange(len(query))[:, None] - np.arange(len(keys))
    hidden = (distance < 0) | (distance >= (attention.window or CTX))
    weights = np.exp(np.where(hidden, -np.inf, scores))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("htk,khd->thd", weights, v).reshape(len(query), -1)


# with a cache of F16, ggml also sums the weighted values in F16: up to 300 roundings of 2^-12 of what is summed
TOLERANCE = {F32: (1e-5, 1e-5), F16: (2e-3, 4e-3)}


@pytest.mark.parametrize("element", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 40, CTX])
def test_attention_over_cache_and_batch(
    kernels: Kernels, window: int | None, softcap: float | None, element: ElementType
) -> None:
    """Batches of every size that ggml has a kernel for, across a bucket, in the second of two layers."""
    attention = Attention(layer=1, scale=0.4, window=window, softcap=softcap)
    kind = {F32: np.float32, F16: np.float16}[element]
    caches = {name: [np.zeros((KV_HEADS, CTX, DIM), kind) for _ in range(2)] for name in ("key", "value")}
    bounds = (0, 5, 6, 100, 101, 300, 301)
    query, keys, values = (random(bounds[-1], heads * DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    stored = [past.astype(kind).reshape(-1, KV_HEADS, DIM) for past in (keys, values)]

    def record(ops: GgmlOps, query: Node, key: Node, value: Node) -> Node:
        heads = ops.heads(query, HEADS), ops.heads(key, KV_HEADS), ops.heads(value, KV_HEADS)
        return ops.attention(*heads, attention)

    for start, stop in pairwise(bounds):
        fresh = [array[start:stop] for array in (query, keys, values)]
        (result,) = kernels(record, *fresh, batch=MicroBatch(start, stop - start), caches=caches, window=window)
        rows = query[start:stop].astype(kind).reshape(-1, HEADS, DIM)
        past = [array[:stop] for array in stored]
        near(result, attended(rows, *past, start, attention), *TOLERANCE[element])
    for cache, expected in zip((caches["key"], caches["value"]), stored, strict=True):
        assert np.array_equal(cache[1][:, : bounds[-1]], expected.swapaxes(0, 1))
        assert not cache[1][:, bounds[-1] :].any() and not cache[0].any()


# how far a number in the cache can be from what was stored, of the largest of its block: half of a last bit; half of a step
# and the scale's own half bit; a whole step at the one end that four bits lack
ROUNDING = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1 / 8 + 2**-11}
# ggml rounds the query as keys are, and to eight bits for both quantized types
OF_QUERY = {"f32": 1e-4, "f16": 2e-3, "bf16": 8e-3, "q8_0": 2e-2, "q4_0": 2e-2}


def rotated(x: Array, order: int) -> Array:
    """Each `order` features of the last dimension times the orthonormal Hadamard matrix, in float64."""
    signs = np.array([[(-1.0) ** (i & j).bit_count() for i in range(order)] for j in range(order)])
    return (x.astype(np.float64).reshape(-1, order) @ signs).reshape(x.shape) / math.sqrt(order)


@pytest.mark.parametrize("dim", [32, 128, 192], ids=lambda dim: f"dim{dim}")
@pytest.mark.parametrize("value", ROUNDING)
@pytest.mark.parametrize("key", ROUNDING)
def test_attention_over_a_cache_of_any_types(kernels: Kernels, key: str, value: str, dim: int) -> None:
    """Against what the cache holds, which is against what was stored: rotated first where it is quantized and can be."""
    types = kv_types(key, value)
    config = ModelConfig(
        architecture="", num_layers=2, hidden_size=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=dim,
        intermediate_size=1, vocab_size=1, context_length=CTX, sliding_windows=(None,) * 2,
    )  # fmt: skip
    model: Any = SimpleNamespace(config=config)
    memory = np.zeros(cache_nbytes(model, CTX, types), np.uint8)
    cache = KVCache(kernels.lib, kernels.anchor, model, CTX, types)
    cache.place(memory.ctypes.data, elsewhere=frozenset())
    attention = Attention(layer=1, scale=dim**-0.5)
    bounds = (0, 5, 6, 100, 101, 300, 301)
    query, both = random(bounds[-1], HEADS * dim), random(bounds[-1], 2 * KV_HEADS * dim)

    def record(ops: GgmlOps, query: Node, both: Node) -> Node:
        past = (ops.heads(part, KV_HEADS) for part in ops.split(both, [KV_HEADS * dim] * 2))  # with gaps between tokens
        return ops.attention(ops.heads(query, HEADS), *past, attention)

    results = [
        kernels(record, query[start:stop], both[start:stop], batch=MicroBatch(start, stop - start), kv=cache.layers)[0]
        for start, stop in pairwise(bounds)
    ]
    orders = [dim & -dim if dim >= 64 and "q" in key else 1, 64 if dim >= 64 and "q" in value else 1]
    rows, start, held = cache.rows(1, 0, bounds[-1]), 0, []
    for name, element, order, fresh in zip((key, value), types, orders, np.split(both, 2, axis=1), strict=True):
        stop = start + element.row_bytes(dim)
        raw = np.ascontiguousarray(rows[..., start:stop]).reshape(-1)
        held.append(dequantize(raw, element, KV_HEADS * bounds[-1] * dim).reshape(KV_HEADS, -1, dim).swapaxes(0, 1))
        exact = rotated(fresh.reshape(-1, KV_HEADS, dim), order)
        block = max(element.block_elements, 1)
        largest = np.abs(exact.reshape(-1, block)).max(-1).repeat(block).reshape(exact.shape)
        assert np.all(np.abs(held[-1] - exact) <= ROUNDING[name] * largest + 1e-6)
        start = align_up(stop, 4)
    turned = rotated(query.reshape(-1, HEADS, dim), orders[0])
    tolerance = OF_QUERY[key] + (4e-3 if value == "f16" else 0.0)  # F16 values are summed in F16
    for (first, last), result in zip(pairwise(bounds), results, strict=True):
        expected = attended(turned[first:last], *(past[:last] for past in held), first, attention)
        expected = rotated(expected.reshape(-1, HEADS, dim), orders[1]).reshape(result.shape)
        near(result, expected, tolerance, tolerance)
    assert not cache.rows(0, 0, CTX).any() and not cache.rows(1, bounds[-1], CTX).any()
    cache.close()
