"""How fast this machine's CPU is on what decoding consists of: matrix-vector products, and attention over the cache."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final

from offload.elements import F16, F32, ElementType, KVTypes
from offload.kernels.ggml.library import load_library
from offload.models.base import ModelConfig
from offload.tiers.ram import Slab
from offload.units import MIB

PROBE_BYTES: Final = 192 * MIB
FEATURES: Final = 4096
FILL: Final = 0x11  # a normal number in every type; untouched zeros would be one page of memory, read from the cache
POSITIONS: Final = 1024
FEWEST_RUNS: Final = 8  # the first ones wake the threads; on a busy machine few run undisturbed


def measure_kernel(element: ElementType, threads: int, *, seconds: float = 0.15, nbytes: int = PROBE_BYTES) -> float:
    """Bytes of weights per second of a matrix-vector product, best of the runs that fit into `seconds`.

    Args:
        nbytes: of the matrix. One that fits the last-level cache looks a tenth or more faster than a model can be.
    """
    rows = max(32, nbytes // element.row_bytes(FEATURES))
    with _scratch(threads) as scratch:
        matrix = scratch.tensor(element, FEATURES, rows)
        vector = scratch.tensor(F32, FEATURES, 1)
        best_s = scratch.best_seconds(scratch.lib.ggml_mul_mat(scratch.context, matrix, vector), seconds)
    return rows * element.row_bytes(FEATURES) / best_s


def measure_attention(config: ModelConfig, kv_types: KVTypes, threads: int, *, seconds: float = 0.03) -> float:
    """Seconds that one token spends on one cached position of one layer: attention's time grows with both.

    Measured on one thread, whose best run is undisturbed also on a busy machine; heads are computed side by side.
    """
    dim, width = config.head_dim, config.num_kv_heads * config.head_dim
    with _scratch(1) as scratch:
        lib, context = scratch.lib, scratch.context
        query = lib.ggml_reshape_3d(context, scratch.tensor(F32, dim, config.num_heads), dim, config.num_heads, 1)
        key, value = (
            lib.ggml_view_3d(
                context,
                scratch.tensor(element, width, POSITIONS),
                dim,
                POSITIONS,
                config.num_kv_heads,
                element.row_bytes(width),
                element.row_bytes(dim),
                0,
            )
            for element in ((kv_types.key, kv_types.key) if config.shares_values else kv_types)
        )
        mask = scratch.tensor(F16, POSITIONS, 1)
        node = lib.ggml_flash_attn_ext(
            context, lib.ggml_permute(context, query, 0, 2, 1, 3), key, value, mask, dim**-0.5, 0.0, 0.0
        )
        return scratch.best_seconds(node, seconds) / POSITIONS / min(threads, config.num_heads)


class _Scratch:
    """Tensors over memory of our own, and a CPU backend that runs one graph of them again and again."""

    def __init__(self, lib: Any, context: int, threads: int) -> None:
        self.lib = lib
        self.context = context
        self._backend = lib.ggml_backend_cpu_init()
        self._allocator = lib.ggml_gallocr_new(lib.ggml_backend_cpu_buffer_type())
        self._memory: list[Slab] = []
        self._anchors: list[int] = []
        lib.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def tensor(self, element: ElementType, features: int, rows: int) -> int:
        """A matrix of normal numbers."""
        memory = Slab(rows * element.row_bytes(features), huge_pages=False, prefault=False)  # the heap would keep it
        ctypes.memset(memory.address, FILL, memory.nbytes)
        tensor: int = self.lib.ggml_new_tensor_2d(self.context, element.ggml_id, features, rows)
        self._memory.append(memory)
        self._anchors.append(self.lib.ggml_backend_cpu_buffer_from_ptr(memory.address, memory.nbytes))
        self.lib.ggml_backend_tensor_alloc(self._anchors[-1], tensor, memory.address)
        return tensor

    def best_seconds(self, node: int, seconds: float) -> float:
        """The shortest of the runs that fit into `seconds`; others may have shared the processor with somebody."""
        graph = self.lib.ggml_new_graph_custom(self.context, 64, False)
        self.lib.ggml_build_forward_expand(graph, node)
        self.lib.ggml_gallocr_alloc_graph(self._allocator, graph)
        best, runs, end = float("inf"), 0, perf_counter() + seconds
        while perf_counter() < end or runs < FEWEST_RUNS:
            start = perf_counter()
            self.lib.ggml_backend_graph_compute(self._backend, graph)
            best, runs = min(best, perf_counter() - start), runs + 1
        return best

    def close(self) -> None:
        for anchor in self._anchors:
            self.lib.ggml_backend_buffer_free(anchor)
        self.lib.ggml_gallocr_free(self._allocator)
        self.lib.ggml_backend_free(self._backend)
        for memory in self._memory:
            memory.close()


@contextmanager
def _scratch(threads: int) -> Iterator[_Scratch]:
    lib = load_library()
    context = lib.context(64 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(64, False))
    scratch = _Scratch(lib, context, threads)
    try:
        yield scratch
    finally:
        scratch.close()
        lib.ggml_free(context)
