"""Experts as a file stores them become the matrices that they are, for any sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.blocks import Extent
from offload.elements import BY_NAME
from offload.models.base import ExpertMatrices, Stored
from offload.models.checkpoint.base import TensorInfo
from offload.unpacking import unpack


def matrix(element: str, rows: int, columns: int) -> TensorInfo:
    kind = BY_NAME[element]
    nbytes = rows * kind.row_bytes(columns)
    return TensorInfo(
        name="m", element=kind, shape=(rows, columns), extent=Extent(path=Path("f"), offset=0, nbytes=nbytes)
    )


def raw(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([("F32", np.float32), ("BF16", np.uint16), ("F16", np.float16)]),
)
def test_alternating_columns_become_rows(width: int, hidden: int, kind: tuple[str, type]) -> None:
    element, dtype = kind
    gate, up = (np.arange(n, n + width * hidden).reshape(width, hidden).astype(dtype) for n in (0, 1000))
    down = np.arange(2000, 2000 + width * hidden).reshape(hidden, width).astype(dtype)
    both = np.empty((hidden, 2 * width), dtype)
    both[:, 0::2], both[:, 1::2] = gate.T, up.T
    matrices = ExpertMatrices(
        matrix(element, width, hidden), matrix(element, width, hidden), matrix(element, hidden, width)
    )
    found = unpack(Stored("transposed", ()), [raw(both), raw(down.T)], matrices)
    for values, expected in zip(found, (gate, up, down), strict=True):
        assert np.array_equal(values, raw(expected))


def blocks_of(nibbles: np.ndarray) -> np.ndarray:
    """[rows, columns] of four-bit values, two neighbours in a byte, as the file has them."""
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).astype(np.uint8)


def ggml_of(nibbles: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The same as ggml's blocks, value by value."""
    rows, columns = nibbles.shape
    result = np.zeros((rows, columns // 32, 17), np.uint8)
    for row, block in np.ndindex(rows, columns // 32):
        values = nibbles[row, 32 * block : 32 * block + 32]
        result[row, block, 0] = scales[row, block]
        for place in range(16):
            result[row, block, 1 + place] = values[place] | (values[place + 16] << 4)
    return result.reshape(-1)


@pytest.mark.parametrize(("width", "hidden"), [(1, 32), (3, 64), (32, 96)])
def test_blocks_of_four_bits_are_those_of_ggml(width: int, hidden: int) -> None:
    random = np.random.default_rng(width)
    if width % 32:
        width = 32 * width
    gate, up = (random.integers(0, 16, (width, hidden)) for _ in range(2))
    down = random.integers(0, 16, (hidden, width))
    scales = {name: random.integers(0, 255, (rows, columns // 32)) for name, (rows, columns) in
              {"gate": gate.shape, "up": up.shape, "down": down.shape}.items()}  # fmt: skip
    both, both_scales = np.empty((2 * width, hidden), np.int64), np.empty((2 * width, hidden // 32), np.uint8)
    both[0::2], both[1::2] = gate, up
    both_scales[0::2], both_scales[1::2] = scales["gate"], scales["up"]
    parts = [blocks_of(both).reshape(-1), both_scales.reshape(-1), blocks_of(down).reshape(-1),
             scales["down"].astype(np.uint8).reshape(-1)]  # fmt: skip
    matrices = ExpertMatrices(
        matrix("MXFP4", width, hidden), matrix("MXFP4", width, hidden), matrix("MXFP4", hidden, width)
    )
    found = unpack(Stored("mxfp4_blocks", ()), parts, matrices)
    for values, nibbles, name in zip(found, (gate, up, down), ("gate", "up", "down"), strict=True):
        assert np.array_equal(values, ggml_of(nibbles, scales[name]))
