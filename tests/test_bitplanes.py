"""Halves of bits: together the original bytes, the high ones alone close to it in value."""

from __future__ import annotations

import numpy as np
import pytest
from support.gguf_checkpoints import quantize

from offload.bitplanes import SUPPORTED, expand, plane_bytes, refine, split
from offload.elements import BY_NAME, element_type
from offload.errors import UnsupportedError
from offload.kernels.ggml.dequantize import dequantize

elements = pytest.mark.parametrize("name", SUPPORTED)


def random_blocks(name: str) -> np.ndarray:
    element = element_type(name)
    return np.random.default_rng(1).integers(0, 256, (50, element.block_bytes), dtype=np.uint8)


@elements
def test_both_planes_together_are_the_original_bytes(name: str) -> None:
    element, blocks = element_type(name), random_blocks(name)
    high, low = split(blocks, element)
    assert (high.shape[1], low.shape[1]) == plane_bytes(element)
    assert sum(plane_bytes(element)) == element.block_bytes, "nothing is kept twice"
    coarse = np.zeros_like(blocks)
    expand(high, element, coarse)
    assert not np.array_equal(coarse, blocks)
    refine(coarse, low, element)
    assert np.array_equal(coarse, blocks)


@elements
def test_a_coarse_copy_is_close_and_does_not_lean_to_one_side(name: str) -> None:
    values = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    element = BY_NAME[name]
    raw = quantize(values, name).reshape(-1, element.block_bytes)
    coarse = np.empty_like(raw)
    expand(split(raw, element)[0], element, coarse)
    exact, rough = (dequantize(part.reshape(-1), element, values.size) for part in (raw, coarse))
    error = rough - exact
    spread = {"Q8_0": 0.1, "Q6_K": 0.1, "Q4_0": 0.4, "Q4_K": 0.4}[name]
    assert 0 < np.abs(error).mean() < spread
    assert abs(error.mean()) < 0.1 * np.abs(error).mean() + 0.02


def test_what_cannot_be_split_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"IQ2_S: its bits cannot be split; a pack is made of Q8_0"):
        plane_bytes(element_type("IQ2_S"))
