"""Arrays as tensors of ggml, and a backend to compute with them: what tests of single kernels begin with."""

from __future__ import annotations

from typing import Any

import numpy as np

from offload.elements import F16, F32
from offload.kernels.ggml.backend import ANCHOR_NBYTES, I32, I64
from offload.kernels.ggml.library import load_library
from offload.units import PAGE, align_up

Array = np.ndarray[Any, Any]


class Leaves:
    """A CPU backend of two threads, and tensors that lie where arrays do."""

    def __init__(self) -> None:
        self.lib = load_library()
        self.backend = self.lib.ggml_backend_cpu_init()
        self.lib.ggml_backend_cpu_set_n_threads(self.backend, 2)
        self.page = np.zeros(2 * PAGE, np.uint8)
        self.start = align_up(self.page.ctypes.data)
        self.anchor = self.lib.ggml_backend_cpu_buffer_from_ptr(self.start, ANCHOR_NBYTES)

    def close(self) -> None:
        self.lib.ggml_backend_buffer_free(self.anchor)
        self.lib.ggml_backend_free(self.backend)

    def leaf(self, context: int, array: Array) -> int:
        """A tensor that lies where the array does."""
        assert array.flags.c_contiguous
        kind = {"f4": F32.ggml_id, "f2": F16.ggml_id, "i4": I32, "i8": I64}[array.dtype.str[1:]]
        columns, rows = array.shape[-1], array.size // array.shape[-1]
        shape = (rows,) if array.ndim > 1 else ()
        make = self.lib.ggml_new_tensor_2d if shape else self.lib.ggml_new_tensor_1d
        tensor: int = make(context, kind, columns, *shape)
        self.lib.ggml_backend_tensor_alloc(self.anchor, tensor, self.start)
        self.lib.data_cell(tensor).value = array.ctypes.data
        return tensor
