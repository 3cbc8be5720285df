"""How fast this machine's CPU multiplies: bytes of weights per second at batch 1, by element type."""

from __future__ import annotations

from time import perf_counter
from typing import Final

import numpy as np

from offload.elements import F32, ElementType
from offload.kernels.ggml.library import load_library
from offload.units import MIB

PROBE_BYTES: Final = 192 * MIB
FEATURES: Final = 4096
FILL: Final = 0x11  # a normal number in every type; untouched zeros would be one page of memory, read from the cache


def measure_kernel(element: ElementType, threads: int, *, seconds: float = 0.15, nbytes: int = PROBE_BYTES) -> float:
    """Bytes of weights per second of a matrix-vector product, best of the runs that fit into `seconds`.

    Args:
        nbytes: of the matrix. One that fits the last-level cache looks a tenth or more faster than a model can be.
    """
    lib = load_library()
    rows = max(32, nbytes // element.row_bytes(FEATURES))
    weights = np.full(rows * element.row_bytes(FEATURES) + 64, FILL, dtype=np.uint8)
    vector = np.ones(FEATURES, dtype=np.float32)
    context = lib.context(64 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(64, False))
    backend = lib.ggml_backend_cpu_init()
    allocator = lib.ggml_gallocr_new(lib.ggml_backend_cpu_buffer_type())
    anchors = []
    try:
        lib.ggml_backend_cpu_set_n_threads(backend, threads)
        matrix = lib.ggml_new_tensor_2d(context, element.ggml_id, FEATURES, rows)
        x = lib.ggml_new_tensor_2d(context, F32.ggml_id, FEATURES, 1)
        for tensor, array in ((matrix, weights), (x, vector)):
            address = -(-array.ctypes.data // 32) * 32 if array is weights else array.ctypes.data
            anchors.append(lib.ggml_backend_cpu_buffer_from_ptr(address - address % 64, array.nbytes + 64))
            lib.ggml_backend_tensor_alloc(anchors[-1], tensor, address)
        graph = lib.ggml_new_graph_custom(context, 64, False)
        lib.ggml_build_forward_expand(graph, lib.ggml_mul_mat(context, matrix, x))
        lib.ggml_gallocr_alloc_graph(allocator, graph)
        best, end = float("inf"), perf_counter() + seconds
        while perf_counter() < end or best == float("inf"):
            start = perf_counter()
            lib.ggml_backend_graph_compute(backend, graph)
            best = min(best, perf_counter() - start)
    finally:
        for anchor in anchors:
            lib.ggml_backend_buffer_free(anchor)
        lib.ggml_gallocr_free(allocator)
        lib.ggml_free(context)
        lib.ggml_backend_free(backend)
    return rows * element.row_bytes(FEATURES) / best
