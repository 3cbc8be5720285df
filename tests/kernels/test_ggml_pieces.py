"""Graphs in pieces: where they are cut, and that a product in parts has the bits of the whole one for every type."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import tiny_checkpoint

from offload.blocks import BlockKey, Extent
from offload.elements import BY_GGML_ID, F32, INTEGER_OR_DOUBLE, ElementType
from offload.kernels.ggml.library import Library, load_library
from offload.kernels.ggml.pieces import Cutter, Part, cut_passes
from offload.kernels.ggml.workspace import Workspace
from offload.models.checkpoint import open_checkpoint
from offload.models.checkpoint.base import TensorInfo
from offload.models.registry import build_model
from offload.units import align_up

COLUMNS = 512
ROWS = (64, 192, 64)  # of the parts
COMPUTED = [element for element in BY_GGML_ID.values() if element.name not in INTEGER_OR_DOUBLE]


class Bench:
    """A matrix of one type in memory, whole and as parts, and a CPU backend."""

    def __init__(self, lib: Library, element: ElementType) -> None:
        self.lib, self.element = lib, element
        self.context = lib.context(64 * lib.ggml_tensor_overhead() + 4 * lib.ggml_graph_overhead_custom(64, False))
        self.backend = lib.ggml_backend_cpu_init()
        lib.ggml_backend_cpu_set_n_threads(self.backend, 2)
        self.memory: list[np.ndarray] = []
        self.buffers: list[int] = []
        weights = quantized(lib, element, np.random.default_rng(0).standard_normal((sum(ROWS), COLUMNS), np.float32))
        self.whole = self.tensor(element, sum(ROWS), weights)
        row = element.row_bytes(COLUMNS)
        starts = [0, *accumulate(ROWS)]
        self.parts = [
            self.tensor(element, count, weights[start * row : (start + count) * row])
            for start, count in zip(starts, ROWS, strict=False)
        ]

    def tensor(self, element: ElementType, rows: int, raw: np.ndarray) -> int:
        memory = np.zeros(raw.nbytes + 4096, np.uint8)
        address = align_up(memory.ctypes.data, 64)
        ctypes.memmove(address, raw.ctypes.data, raw.nbytes)
        tensor: int = self.lib.ggml_new_tensor_2d(self.context, element.ggml_id, COLUMNS, rows)
        buffer = self.lib.ggml_backend_cpu_buffer_from_ptr(address, align_up(raw.nbytes, 64))
        self.lib.ggml_backend_tensor_alloc(buffer, tensor, address)
        self.memory.append(memory)
        self.buffers.append(buffer)
        return tensor

    def product(self, tokens: int, forms: dict[str, tuple[Part, ...]]) -> tuple[np.ndarray, int]:
        """`(2 x) W'` for some x, and in how many pieces it was computed."""
        lib = self.lib
        x = np.random.default_rng(1).standard_normal((tokens, COLUMNS), np.float32)
        graph = lib.ggml_new_graph_custom(self.context, 64, False)
        factor = lib.ggml_scale(self.context, self.tensor(F32, tokens, x.reshape(-1).view(np.uint8)), 2.0)
        node = lib.ggml_mul_mat(self.context, self.whole, factor)
        cutter = Cutter(lib, self.context, graph, forms)
        cutter.note("w", node, factor, tokens)
        result = lib.ggml_scale(self.context, node, 0.5)
        lib.ggml_build_forward_expand(graph, result)
        workspace = Workspace(lib)
        workspace.allocate(graph)
        contexts, pieces = cutter.cut(lambda key: self.parts[key.part], lambda key: described(self.element, key.part))
        for piece in pieces:
            assert lib.ggml_backend_graph_compute(self.backend, piece) == 0
        address = lib.ggml_get_data(result)
        values = np.ctypeslib.as_array((ctypes.c_float * (tokens * sum(ROWS))).from_address(address)).copy()
        workspace.release()
        for context in contexts:
            lib.ggml_free(context)
        return values, len(pieces)

    def close(self) -> None:
        for buffer in self.buffers:
            self.lib.ggml_backend_buffer_free(buffer)
        self.lib.ggml_backend_free(self.backend)
        self.lib.ggml_free(self.context)


def quantized(lib: Library, element: ElementType, values: np.ndarray) -> np.ndarray:
    """`values` in the element type, by ggml's own quantizers."""
    quantize = ctypes.CDLL(lib._open("ggml-base")._name).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    out = np.zeros(values.shape[0] * element.row_bytes(values.shape[1]), np.uint8)
    importance = np.ones(values.shape[1], np.float32)
    written = quantize(element.ggml_id, values.ctypes.data, out.ctypes.data, 0, *values.shape, importance.ctypes.data)
    assert written == out.nbytes
    return out


def described(element: ElementType, number: int) -> TensorInfo:
    extent = Extent(path=Path("w"), offset=0, nbytes=ROWS[number] * element.row_bytes(COLUMNS))
    return TensorInfo(name="w", element=element, shape=(ROWS[number], COLUMNS), extent=extent)


def form(*streamed: bool) -> dict[str, tuple[Part, ...]]:
    return {"w": tuple(Part(BlockKey("weight", 0, "w", i), arrives) for i, arrives in enumerate(streamed))}


@pytest.fixture(params=COMPUTED, ids=str)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(load_library(), request.param)
    yield bench
    bench.close()


@pytest.mark.parametrize("tokens", [1, 2, 48])
def test_a_product_in_parts_has_the_bits_of_the_whole_one(bench: Bench, tokens: int) -> None:
    whole, pieces = bench.product(tokens, {})
    assert pieces == 1 and np.isfinite(whole).all() and np.abs(whole).max() > 1
    for streamed in ((True, True, True), (False, True, False), (False, False, False)):
        values, pieces = bench.product(tokens, form(*streamed))
        assert pieces == 1 + sum(streamed)
        assert np.array_equal(values, whole)


def test_a_pass_is_cut_before_each_block_that_has_to_arrive(tmp_path: Path) -> None:
    model = build_model(open_checkpoint(tiny_checkpoint("llama", tmp_path)), 64)
    keys = {
        name: (BlockKey("weight", stage.layer, name), BlockKey("weight", stage.layer, name, 1))
        for stage in model.stages
        for name in stage.matrices
    }
    every = [key for stage in model.stages for name in stage.matrices for key in keys[name]]
    assert [piece.streamed for piece in cut_passes(model, keys, frozenset())] == [()]
    streamed = [every[0], every[5], every[6], every[-1]]
    pieces = cut_passes(model, keys, frozenset(streamed))
    assert [piece.streamed for piece in pieces] == [(), *((key,) for key in streamed)]
    assert [piece.pinned for piece in pieces] == [0, 4, 0, len(every) - 8, 0]
    assert pieces[2].name == str(every[5])
