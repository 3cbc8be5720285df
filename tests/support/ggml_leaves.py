"""Arrays as tensors of ggml, and a backend to compute with them: what tests of single kernels begin with."""

from __future__ import annotations

from typing import Any

import numpy as np

from offload.elements import F16, F32
from offload.kernels.ggml.anchor import Anchor
from offload.kernels.ggml.library import I32, I64, load_library

Array = np.ndarray[Any, Any]


class Leaves:
    """A CPU backend of two threads, and tensors that lie where arrays do."""

    def __init__(self) -> None:
        self.lib = load_library()
        self.backend = self.lib.ggml_backend_cpu_init()
        self.lib.ggml_backend_cpu_set_n_threads(self.backend, 2)
        self.anchor = Anchor(self.lib)

    def close(self) -> None:
        self.anchor.close()
        self.lib.ggml_backend_free(self.backend)

    def leaf(self, context: int, array: Array) -> int:
        """A tensor that lies where the array does."""
        assert array.flags.c_contiguous
        kind = {"f4": F32.ggml_id, "f2": F16.ggml_id, "i4": I32, "i8": I64}[array.dtype.str[1:]]
        make = getattr(self.lib, f"ggml_new_tensor_{array.ndim}d")
        tensor: int = make(context, kind, *reversed(array.shape))
        self.anchor(tensor).value = array.ctypes.data
        return tensor
