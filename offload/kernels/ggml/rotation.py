"""Rotations that spread a head's features evenly before they are quantized, as llama.cpp has them.

A block of 32 shares one scale, so a few large features cost all others their precision. An orthonormal rotation changes no
product of a query with a key, so both are rotated; what attention makes of rotated values is rotated back.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from offload.elements import KVTypes
from offload.models.base import ModelConfig

LEAST_ORDER: Final = 64  # heads whose features are no multiple of it are quantized as they are


class Rotation(NamedTuple):
    """A Hadamard matrix, which is its own inverse, for each `order` features of a head."""

    tensor: int
    order: int


def rotation_orders(config: ModelConfig, types: KVTypes) -> tuple[int | None, int | None]:
    """Of keys and values, None where they are kept as they are. As large as heads of keys allow, and the least for values.

    These are llama.cpp's, which rotates nothing where values are features of keys.
    """
    if config.shares_values:
        return None, None
    key_dim, value_dim = config.cache_dims
    order = key_dim & -key_dim
    key = order if types.key.is_quantized and order >= LEAST_ORDER else None
    return key, LEAST_ORDER if types.value.is_quantized and value_dim % LEAST_ORDER == 0 else None


def hadamard(order: int) -> npt.NDArray[np.float32]:
    """The symmetric orthonormal matrix of a power of two."""
    signs = np.ones((1, 1), np.float32)
    while len(signs) < order:
        signs = np.block([[signs, signs], [signs, -signs]])
    return np.asarray(signs / np.sqrt(np.float32(order)), np.float32)
