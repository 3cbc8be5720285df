"""Quantized blocks to float32 in plain torch operations, on any device, bit for bit as ggml's own `to_float`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from offload.elements import ElementType
from offload.errors import UnsupportedError
from offload.kernels.torch import i_quants, k_quants, simple_quants

_PLAIN: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,  # without the scales, which the tensor does not hold
}
_DECODERS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "IQ1_M": i_quants.iq1_m,
    "IQ1_S": i_quants.iq1_s,
    "IQ2_S": i_quants.iq2_s,
    "IQ2_XS": i_quants.iq2_xs,
    "IQ2_XXS": i_quants.iq2_xxs,
    "IQ3_S": i_quants.iq3_s,
    "IQ3_XXS": i_quants.iq3_xxs,
    "IQ4_NL": simple_quants.iq4_nl,
    "IQ4_XS": i_quants.iq4_xs,
    "MXFP4": simple_quants.mxfp4,
    "NVFP4": simple_quants.nvfp4,
    "Q1_0": simple_quants.q1_0,
    "Q2_0": simple_quants.q2_0,
    "Q2_K": k_quants.q2_k,
    "Q3_K": k_quants.q3_k,
    "Q4_0": simple_quants.q4_0,
    "Q4_1": simple_quants.q4_1,
    "Q4_K": k_quants.q4_k,
    "Q5_0": simple_quants.q5_0,
    "Q5_1": simple_quants.q5_1,
    "Q5_K": k_quants.q5_k,
    "Q6_K": k_quants.q6_k,
    "Q8_0": simple_quants.q8_0,
    "TQ1_0": simple_quants.tq1_0,
    "TQ2_0": simple_quants.tq2_0,
}
DECODABLE: Final = frozenset(_PLAIN) | frozenset(_DECODERS)
"""Names of the element types that `dequantize` knows."""

_ALIGNMENT: Final = 64
"""Bytes. A CPU's kernels add up a product in another order where a matrix lies otherwise, and no bit may depend on where a
block lies."""
_CHUNK_ELEMENTS: Final = 2**22  # decoded at a time: intermediate integers take up to 16 bytes an element


def dequantize(raw: torch.Tensor, element: ElementType, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 values of a stored tensor, on the device of `raw`.

    Args:
        raw: uint8, contiguous, exactly the stored bytes; need not be aligned.
        element: how they are stored.
        shape: outermost first.

    Raises:
        UnsupportedError: no decoder for the type.
    """
    if element.name in _PLAIN:
        if raw.data_ptr() % _ALIGNMENT or raw.storage_offset() % element.block_bytes:
            raw = raw.clone()  # torch aligns what it allocates
        return raw.view(_PLAIN[element.name]).float().reshape(shape)
    decode = _DECODERS.get(element.name)
    if decode is None:
        raise UnsupportedError(f"element type {element}: the torch kernels cannot decode it")
    blocks = raw.reshape(-1, element.block_bytes)
    values = torch.empty((blocks.shape[0], element.block_elements), dtype=torch.float32, device=raw.device)
    step = _CHUNK_ELEMENTS // element.block_elements
    for start in range(0, blocks.shape[0], step):
        values[start : start + step] = decode(blocks[start : start + step])
    return values.reshape(shape)
