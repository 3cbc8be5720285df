"""Quantized blocks to float32 in plain torch operations, on any device, bit for bit as ggml's own `to_float`."""

from __future__ import annotations

import torch

from offload.elements import ElementType
from offload.errors import UnsupportedError


def dequantize(raw: torch.Tensor, element: ElementType, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 values of a stored tensor.

    Args:
        raw: uint8, the stored bytes, on any device.
        element: how they are stored.
        shape: outermost first.

    Raises:
        UnsupportedError: no decoder for the type.
    """
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(element.name)
    if plain is None:
        raise UnsupportedError(f"element type {element} cannot be decoded by the torch kernels")
    return raw.view(plain).float().reshape(shape)
