"""Rows of any element type to float32, by ggml's own reference conversion."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from offload.elements import ElementType
from offload.errors import UnsupportedError
from offload.kernels.ggml.library import load_library


def dequantize(raw: npt.NDArray[np.uint8], element: ElementType, count: int) -> npt.NDArray[np.float32]:
    """`count` elements stored in `raw` (uint8, contiguous) as float32 [count].

    Raises:
        UnsupportedError: ggml has no conversion for this type.
    """
    nbytes = element.row_bytes(count)
    assert raw.flags.c_contiguous and raw.nbytes >= nbytes, (raw.nbytes, nbytes)
    if element.name == "F32":
        floats: npt.NDArray[np.float32] = raw.reshape(-1)[:nbytes].view(np.float32).copy()
        return floats
    to_float = load_library().ggml_get_type_traits(element.ggml_id).contents.to_float
    if not ctypes.cast(to_float, ctypes.c_void_p).value:
        raise UnsupportedError(f"element type {element}: ggml cannot convert it to float32")
    result = np.empty(count, dtype=np.float32)
    to_float(raw.ctypes.data, result.ctypes.data, count)
    return result
