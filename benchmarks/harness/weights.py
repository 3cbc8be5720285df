"""Random weights in the bytes of their storage type, fast enough for files of many gigabytes.

Quantized blocks are random bytes with fixed fp16 scales, chosen so that the dequantized values have mean zero and a standard
deviation of 1/sqrt(in_features): activations keep their size from layer to layer and logits stay finite and distinct.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod, sqrt
from typing import Final, NamedTuple

import numpy as np

from offload.elements import element_type

CHUNK_BYTES: Final = 16 * 1024**2


class Field(NamedTuple):
    """A fp16 scale of a block: where it lies, and its value as a factor on the wanted standard deviation."""

    offset: int
    factor: float


# Q4_K: d * scale * q - dmin * min; scale, min uniform in 0..63, q in 0..15: dmin = 7.5 d centres it, deviation 258 d
# Q6_K: d * scale * q; scale uniform in -128..127, q in -32..31: deviation 1367 d.   Q8_0: d * q: deviation 74 d
_SCALES: Final = {
    "Q4_K": (Field(0, 1 / 258), Field(2, 7.5 / 258)),
    "Q6_K": (Field(208, 1 / 1367),),
    "Q8_0": (Field(0, 1 / 74),),
}
SUPPORTED: Final = ("BF16", "F32", *_SCALES)


def vector(nbytes: int, element: str, fill: float = 1.0) -> bytes:
    """A norm, all of whose elements are `fill`: F32, or BF16 cut off."""
    one = struct.pack("<f", fill)
    one = one[2:] if element == "BF16" else one
    return one * (nbytes // len(one))


def matrix(element: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[bytes]:
    """A matrix (out_features, in_features) in chunks."""
    kind = element_type(element)
    remaining = prod(shape) // kind.block_elements  # blocks
    deviation = 1 / sqrt(shape[-1])
    while remaining:
        num_blocks = min(remaining, CHUNK_BYTES // kind.block_bytes)
        if element in _SCALES:
            yield _quantized(element, num_blocks, deviation, rng)
        else:
            yield _plain(element, num_blocks, deviation, rng)
        remaining -= num_blocks


def _quantized(element: str, num_blocks: int, deviation: float, rng: np.random.Generator) -> bytes:
    width = element_type(element).block_bytes
    blocks = np.frombuffer(bytearray(rng.bytes(num_blocks * width)), np.uint8).reshape(num_blocks, width)
    for offset, factor in _SCALES[element]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(factor * deviation).tobytes(), np.uint8)
    return blocks.tobytes()


def _plain(element: str, count: int, deviation: float, rng: np.random.Generator) -> bytes:
    values = rng.standard_normal(count, np.float32) * np.float32(deviation)
    return values.tobytes() if element == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
