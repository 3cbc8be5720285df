"""K types: 256 elements in groups, each group with a quantized scale of its own.

Each decoder takes uint8 [n, block_bytes] and gives float32 [n, 256]; the arithmetic is ggml's, step by step.
"""

from __future__ import annotations

import torch

from offload.kernels.torch.unpack import fields, grouped, half, integers, nibbles, planes


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """Sixteen groups of 16: two bits, scale and minimum of four bits each."""
    packed = integers(blocks, 0, 16)
    codes = planes(grouped(integers(blocks, 16, 80), 2, 32), 2).reshape(-1, 16, 16)
    scale = half(blocks, 80) * (packed & 15).float()
    minimum = half(blocks, 82) * (packed >> 4).float()
    return (scale.unsqueeze(-1) * codes.float() - minimum.unsqueeze(-1)).flatten(1)


def q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """Sixteen groups of 16: two bits and a third that stands apart, six-bit signed scales."""
    high = planes(integers(blocks, 0, 32), 1).reshape(-1, 16, 16)
    codes = planes(grouped(integers(blocks, 32, 96), 2, 32), 2).reshape(-1, 16, 16)
    packed = integers(blocks, 96, 108)
    upper = planes(packed[:, 8:], 2).flatten(1)
    scale = half(blocks, 108) * ((nibbles(packed[:, :8]) | upper << 4) - 32).float()
    return (scale.unsqueeze(-1) * (codes - 4 + (high << 2)).float()).flatten(1)


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """Eight groups of 32: four bits, scale and minimum of six bits each."""
    codes = nibbles(grouped(integers(blocks, 16, 144), 4, 32)).reshape(-1, 8, 32)
    return _scaled(blocks, codes)


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """Eight groups of 32: as Q4_K, with fifth bits that stand together."""
    high = planes(integers(blocks, 16, 48), 1)
    codes = nibbles(grouped(integers(blocks, 48, 176), 4, 32)).reshape(-1, 8, 32)
    return _scaled(blocks, codes | high << 4)


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """Sixteen groups of 16: six bits, scales of a signed byte."""
    low = nibbles(grouped(integers(blocks, 0, 128), 2, 64))
    high = planes(grouped(integers(blocks, 128, 192), 2, 32), 2).flatten(-2)
    codes = (low | high << 4).reshape(-1, 16, 16) - 32
    scale = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scale.unsqueeze(-1) * codes.float()).flatten(1)


def _scaled(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Codes [n, 8, 32] times scale less minimum, from the 16-byte head that Q4_K and Q5_K share."""
    packed = integers(blocks, 4, 16)
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=-1)
    minimum = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=-1)
    scales = half(blocks, 0) * scale.float()
    minima = half(blocks, 2) * minimum.float()
    return (scales.unsqueeze(-1) * codes.float() - minima.unsqueeze(-1)).flatten(1)


def iq4_xs_scales(blocks: torch.Tensor) -> torch.Tensor:
    """Signed six-bit scales of IQ4_XS, int32 [n, 8]: four bits of each in one place, two in another."""
    low = fields(integers(blocks, 4, 8), 4)
    high = fields(integers(blocks, 2, 4), 2)
    return (low | high << 4) - 32
