"""Experts whose bytes in a file are not what kernels compute with: made into that when they arrive. Numpy only.

    transposed      gate_up_proj [hidden, 2 * width], down_proj [width, hidden]; gate and up alternate (gpt-oss as trained)
    mxfp4_blocks    gate_up_proj_blocks [2 * width, hidden / 32, 16] and _scales, likewise down_proj (gpt-oss as published)

Costs a processor about three times as long as reading costs a fast disk; a GGUF of the model needs none of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offload.kernels.batch import Bytes
from offload.models.base import ExpertMatrices, Stored
from offload.models.checkpoint.base import TensorInfo

_HALF = 8  # bytes of sixteen values: half of a block


def unpack(stored: Stored, parts: Sequence[Bytes], matrices: ExpertMatrices) -> tuple[Bytes, Bytes, Bytes]:
    """The bytes of an expert's gate, up and down matrices.

    Args:
        parts: what was read, one array for each of the expert's extents.
    """
    if stored.kind == "transposed":
        both, down = parts
        gate, up = (_transposed(both, matrices.gate, place, 2) for place in (0, 1))
        return gate, up, _transposed(down, matrices.down, 0, 1)
    blocks, scales, down_blocks, down_scales = parts
    gate, up = (_blocks(blocks, scales, matrices.gate, place, 2) for place in (0, 1))
    return gate, up, _blocks(down_blocks, down_scales, matrices.down, 0, 1)


def _transposed(raw: Bytes, matrix: TensorInfo, place: int, step: int) -> Bytes:
    """Every `step`-th column as a row."""
    rows, columns = matrix.shape
    values = raw.view(f"u{matrix.element.block_bytes}").reshape(columns, rows * step)
    return np.ascontiguousarray(values[:, place::step].T).reshape(-1).view(np.uint8)


def _blocks(blocks: Bytes, scales: Bytes, matrix: TensorInfo, place: int, step: int) -> Bytes:
    """Every `step`-th row as ggml's MXFP4: scale, then values n and n + 16 in a byte, where the file has 2n and 2n + 1."""
    rows, columns = matrix.shape
    count = columns // matrix.element.block_elements
    pairs = blocks.reshape(rows * step, count, 2 * _HALF)[place::step]
    first, second = pairs[..., :_HALF], pairs[..., _HALF:]
    result = np.empty((rows, count, 1 + 2 * _HALF), np.uint8)
    result[..., 0] = scales.reshape(rows * step, count)[place::step]
    result[..., 1::2] = (first & 0x0F) | (second << 4)
    result[..., 2::2] = (first >> 4) | (second & 0xF0)
    return result.reshape(-1)
