"""Matrices in FP8 with their scales: code times scale, rounded once, whoever decodes them; and their products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.blocks import Extent
from offload.elements import F8_E4M3
from offload.kernels.torch.products import FEW_TOKENS
from offload.kernels.torch.scales import BlockScales, scales_of
from offload.models.checkpoint.base import Scales, TensorInfo

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # Triton's interpreter is numpy
CASES = [
    ((5, 256), (128, 128)),
    ((130, 300), (128, 128)),
    ((9, 144), (1, 144)),
    ((7, 272), (7, 272)),
    ((6, 50), (4, 20)),
    ((3, 80), (2, 20)),
]
"""Shapes of matrices and of what has one scale: rows that are loaded by sixteens or not, blocks that are cut off."""
cases = pytest.mark.parametrize(("shape", "block"), CASES)
EXTREME = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 2.0**-120, 1.0, -3.5, 3e38, float("inf"), float("nan")]


def code_values() -> np.ndarray:
    """Of all 256 codes, by the definition (OCP 8-bit Floating Point 1.0): no infinities, two codes that are no number."""
    values = np.empty(256, np.float32)
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values[code] = np.copysign(np.nan if code & 127 == 127 else size, -1 if code & 128 else 1)
    return values


def expected_values(codes: np.ndarray, grid: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    rows, columns = np.indices(codes.shape)
    return code_values()[codes] * grid[rows // block[0], columns // block[1]]


def grid_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def scaled(grid: np.ndarray, block: tuple[int, int], device: str) -> BlockScales:
    return BlockScales(torch.from_numpy(np.ascontiguousarray(grid)).to(device), *block)


def same_bits(found: torch.Tensor, expected: np.ndarray) -> None:
    """The sign and payload of what is no number are the processor's affair."""
    actual = found.cpu().numpy()
    differs = (actual.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(actual) & np.isnan(expected))
    assert not differs.any(), (expected[differs][:4], actual[differs][:4])


def test_every_code_times_every_extreme_scale(multiplier) -> None:
    """Not-a-number codes come out as that; denormal, infinite and not-a-number scales as in float32."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (len(EXTREME), 1))
    grid = np.array(EXTREME, np.float32)[:, None]
    raw = torch.from_numpy(codes.reshape(-1)).to(multiplier.device)
    found = multiplier.products.values(raw, F8_E4M3, codes.shape, scaled(grid, (1, 256), multiplier.device))
    same_bits(found, expected_values(codes, grid, (1, 256)))


@cases
def test_each_element_has_the_scale_of_its_block(multiplier, shape: tuple[int, int], block: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    codes = random.integers(0, 256, shape, dtype=np.uint8)
    grid = random.uniform(-2, 2, grid_shape(shape, block)).astype(np.float32)
    raw = torch.from_numpy(codes.reshape(-1)).to(multiplier.device)
    found = multiplier.products.values(raw, F8_E4M3, shape, scaled(grid, block, multiplier.device))
    same_bits(found, expected_values(codes, grid, block))


def finite(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    codes = random.integers(0, 256, shape, dtype=np.uint8)
    return np.where(codes & 127 == 127, 5, codes).astype(np.uint8)


@cases
@pytest.mark.parametrize("tokens", [1, 3, FEW_TOKENS + 1])
def test_a_product_is_that_of_the_values(
    multiplier, shape: tuple[int, int], block: tuple[int, int], tokens: int
) -> None:
    """Of few tokens and of many, for whom values are written out."""
    random = np.random.default_rng(2)
    codes, x = finite(random, shape), random.standard_normal((tokens, shape[1])).astype(np.float32)
    grid = random.uniform(0.001, 2, grid_shape(shape, block)).astype(np.float32)
    matrix = expected_values(codes, grid, block).astype(np.float64)
    raw, given_x = (torch.from_numpy(array).to(multiplier.device) for array in (codes.reshape(-1), x))
    found = multiplier.products.product(given_x, raw, F8_E4M3, shape, scaled(grid, block, multiplier.device))
    largest = (np.abs(x).astype(np.float64) @ np.abs(matrix).T).max()
    assert np.abs(found.cpu().numpy() - x @ matrix.T).max() <= 1e-6 * largest


@settings(max_examples=20, deadline=None)
@given(case=st.sampled_from(CASES), order=st.lists(st.integers(0, 3), min_size=1, max_size=6), shared=st.booleans())
def test_experts_have_their_own_matrix_and_their_own_scales(
    multiplier, case: tuple[tuple[int, int], tuple[int, int]], order: list[int], shared: bool
) -> None:
    """As a backend asks: the expert's number chooses the scales, its slot the bytes; neither is the other."""
    shape, block = case
    random, offset, stride, nbytes = np.random.default_rng(3), 64, 128, shape[0] * shape[1]
    starts = [1001, 0, 1500, 499]  # by expert, in strides
    bank = np.full(1500 * stride + offset + nbytes, 0x7E, np.uint8)
    codes = [finite(random, shape) for _ in starts]
    for start, own in zip(starts, codes, strict=True):
        bank[start * stride + offset :][:nbytes] = own.reshape(-1)
    grids = random.uniform(0.01, 2, (len(starts), *grid_shape(shape, block))).astype(np.float32)
    x = random.standard_normal((1 if shared else len(order), shape[1])).astype(np.float32)
    on_device = {name: torch.from_numpy(array).to(multiplier.device) for name, array in
                 {"x": x, "bank": bank, "grids": grids.reshape(-1), "numbers": np.array(order)}.items()}  # fmt: skip
    slots = torch.tensor([starts[number] for number in order], dtype=torch.int32, device=multiplier.device)
    extent = Extent(path=None, offset=0, nbytes=nbytes)  # type: ignore[arg-type]
    info = TensorInfo(name="up", element=F8_E4M3, shape=shape, extent=extent, scales=Scales("grids", 0, *block))
    scales = scales_of(info, on_device.__getitem__, on_device["numbers"])
    found = multiplier.products.expert_products(
        on_device["x"], slots, on_device["bank"], offset, stride, F8_E4M3, shape, scales
    )
    for place, number in enumerate(order):
        matrix = expected_values(codes[number], grids[number], block).astype(np.float64)
        row = x[0 if shared else place]
        largest = (np.abs(row) @ np.abs(matrix).T).max()
        assert np.abs(found[place].cpu().numpy() - matrix @ row).max() <= 1e-6 * largest
