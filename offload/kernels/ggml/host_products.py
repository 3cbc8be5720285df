"""Products of one token with rows of matrices, on the CPU where they lie, for a backend that computes the rest elsewhere."""

from __future__ import annotations

import ctypes
from typing import Final, NamedTuple

import numpy as np

from offload.elements import F32
from offload.errors import BackendError, Cancelled
from offload.kernels.batch import Floats
from offload.kernels.ggml.anchor import Anchor
from offload.kernels.ggml.library import STATUS_ABORTED, STATUS_SUCCESS, AbortCallback, Library, load_library
from offload.models.base import Model
from offload.models.checkpoint.base import TensorInfo
from offload.tiers.base import CancelToken

NODES: Final = 4  # of a graph: one product, and its inputs


class _Product(NamedTuple):
    context: int
    graph: int
    columns: int
    rows: int


class HostProducts:
    """See the module. Called from one thread."""

    def __init__(self, model: Model, threads: int) -> None:
        self._lib = load_library()
        self._backend = self._lib.ggml_backend_cpu_init()
        self._lib.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._anchor = Anchor(self._lib)
        self._x, self._y = (np.zeros(_widest(model), np.float32) for _ in range(2))
        self._products: dict[str, _Product] = {}

    @staticmethod
    def nbytes(model: Model) -> int:
        """Host memory that all matrices take beside their bytes: descriptions, and activations as floats and quantized."""
        return len(model.matrices) * _description_nbytes(load_library()) + 4 * 4 * _widest(model)

    def place(self, name: str, info: TensorInfo, first: int, address: int) -> None:
        """From row `first` on, the matrix `name` [out_features, in_features] is the host's; that row lies at `address`."""
        lib, (rows, columns) = self._lib, info.shape
        context = lib.context(_description_nbytes(lib))
        matrix = lib.ggml_new_tensor_2d(context, info.element.ggml_id, columns, rows - first)
        x = lib.ggml_new_tensor_2d(context, F32.ggml_id, columns, 1)
        y = lib.ggml_mul_mat(context, matrix, x)
        for tensor, place in ((matrix, address), (x, self._x.ctypes.data), (y, self._y.ctypes.data)):
            self._anchor(tensor).value = place
        graph = lib.ggml_new_graph_custom(context, NODES, False)
        lib.ggml_build_forward_expand(graph, y)
        self._products[name] = _Product(context, graph, columns, rows - first)

    def product(self, name: str, x: Floats) -> Floats:
        """The last elements of `matrix @ x`, float32, of x [in_features]: a view that the next call overwrites.

        Raises:
            Cancelled, BackendError: it was not computed.
        """
        product = self._products[name]
        self._x[: product.columns] = x
        status = self._lib.ggml_backend_graph_compute(self._backend, product.graph)
        if status == STATUS_ABORTED:
            raise Cancelled("cancelled")
        if status != STATUS_SUCCESS:
            raise BackendError(f"ggml: the host's rows of {name} failed with status {status}")
        return self._y[: product.rows]

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """Looks at this token between the nodes of a graph; it must live until another one is set."""
        callback, flag = (
            (AbortCallback(), None) if cancel is None else (self._lib.is_set, ctypes.addressof(cancel.flag))
        )
        self._lib.ggml_backend_cpu_set_abort_callback(self._backend, callback, flag)

    def close(self) -> None:
        """Frees everything. Idempotent."""
        if not self._backend:
            return
        for product in self._products.values():
            self._lib.ggml_free(product.context)
        self._products.clear()
        self._anchor.close()
        self._lib.ggml_backend_free(self._backend)
        self._backend = 0


def _description_nbytes(lib: Library) -> int:
    return int(NODES * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(NODES, False) + 1024)


def _widest(model: Model) -> int:
    return max(max(matrix.shape) for matrix in model.matrices.values())
