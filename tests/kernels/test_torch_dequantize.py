"""Every decoder against ggml's own conversion, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offload.elements import BY_NAME, F8_E4M3, INTEGER_OR_DOUBLE, ElementType, element_type
from offload.errors import UnsupportedError
from offload.kernels.ggml.dequantize import dequantize as ggml_dequantize
from offload.kernels.torch.dequantize import DECODABLE, dequantize

NUM_BLOCKS = 257
IN_GGML = sorted(DECODABLE - {F8_E4M3.name})


def same_bits(raw: np.ndarray, element: ElementType, device: str) -> None:
    """Equal bits, or not a number on both sides (the sign and payload of those are the processor's affair)."""
    count = raw.size // element.block_bytes * element.block_elements
    expected = ggml_dequantize(np.ascontiguousarray(raw), element, count)
    actual = dequantize(torch.from_numpy(raw.reshape(-1)).to(device), element, (count,)).cpu().numpy()
    both_nan = np.isnan(expected) & np.isnan(actual)
    differs = (expected.view(np.uint32) != actual.view(np.uint32)) & ~both_nan
    where = np.flatnonzero(differs)[:4]
    assert not differs.any(), (element.name, where, expected[where], actual[where])


def random_blocks(element: ElementType, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (NUM_BLOCKS, element.block_bytes), dtype=np.uint8)


def test_every_weight_type_has_a_decoder() -> None:
    assert set(BY_NAME) - INTEGER_OR_DOUBLE == DECODABLE


@pytest.mark.parametrize("name", IN_GGML)
def test_random_blocks(name: str, device: str) -> None:
    for seed in range(4):
        same_bits(random_blocks(element_type(name), seed), element_type(name), device)


@pytest.mark.parametrize("name", IN_GGML)
def test_extreme_blocks(name: str, device: str) -> None:
    """All bytes equal: largest and smallest codes, denormal, infinite and not-a-number scales."""
    element = element_type(name)
    same_bits(np.repeat(np.arange(256, dtype=np.uint8)[:, None], element.block_bytes, axis=1), element, device)


@pytest.mark.parametrize("name", IN_GGML)
def test_every_byte_of_a_block_is_used_as_ggml_uses_it(name: str, device: str) -> None:
    """Blocks that differ from zero, or from a plain scale, in a single byte."""
    element = element_type(name)
    size = element.block_bytes
    base = np.zeros((3 * size, size), dtype=np.uint8)
    base[size:] = 0x3C  # every two bytes of it are a number near one
    for index in range(size):
        base[[index, size + index, 2 * size + index], index] = (0x5A, 0xA5, 0xFF)
    same_bits(base, element, device)


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q4_K", "IQ2_XXS"])
def test_unaligned_bytes(name: str, device: str) -> None:
    element = element_type(name)
    raw = random_blocks(element, 9)
    shifted = torch.zeros(raw.size + 1, dtype=torch.uint8, device=device)
    shifted[1:] = torch.from_numpy(raw.reshape(-1)).to(device)
    shape = (NUM_BLOCKS, element.block_elements)
    aligned = dequantize(torch.from_numpy(raw.reshape(-1)).to(device), element, shape)
    assert torch.equal(dequantize(shifted[1:], element, shape).nan_to_num(), aligned.nan_to_num())


def test_long_tensors_are_decoded_in_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    element = element_type("Q4_K")
    monkeypatch.setattr("offload.kernels.torch.dequantize._CHUNK_ELEMENTS", 10 * 256)
    same_bits(random_blocks(element, 1), element, device)


def test_integers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="I32: the torch kernels cannot decode it"):
        dequantize(torch.zeros(4, dtype=torch.uint8), element_type("I32"), (1,))
