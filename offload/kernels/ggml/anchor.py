"""Tensors that live in our memory: ggml wants a buffer object for them, which is never read through."""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np

from offload.kernels.ggml.library import Library
from offload.units import align_up

_NBYTES: Final = 1 << 46


class Anchor:
    """Marks tensors as living outside of the graph allocator's memory."""

    def __init__(self, library: Library) -> None:
        self._lib = library
        self._memory = np.zeros(8192, dtype=np.uint8)
        self._address = align_up(self._memory.ctypes.data)
        self._buffer = library.ggml_backend_cpu_buffer_from_ptr(self._address, _NBYTES)

    def __call__(self, tensor: int) -> ctypes.c_uint64:
        """Marks `tensor`; returns the cell that moves it: its data pointer."""
        self._lib.ggml_backend_tensor_alloc(self._buffer, tensor, self._address)
        return self._lib.data_cell(tensor)

    def close(self) -> None:
        """After all tensors that it has marked are gone."""
        self._lib.ggml_backend_buffer_free(self._buffer)
