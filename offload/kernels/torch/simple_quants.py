"""Types of one scale per block: Q4_0 to Q8_0, the ternary types, one and two bits, MXFP4, NVFP4 and IQ4_NL.

Each decoder takes uint8 [n, block_bytes] and gives float32 [n, block_elements]; the arithmetic is ggml's, step by step.
"""

from __future__ import annotations

import torch

from offload.kernels.torch.codebooks import codebook
from offload.kernels.torch.unpack import fields, grouped, half, integers, nibbles, planes


def q1_0(blocks: torch.Tensor) -> torch.Tensor:
    """A sign per element."""
    scale = half(blocks, 0)
    return torch.where(fields(integers(blocks, 2, 18), 1) == 1, scale, -scale)


def q2_0(blocks: torch.Tensor) -> torch.Tensor:
    """-1 to 2, four to a byte."""
    return (fields(integers(blocks, 2, 18), 2) - 1).float() * half(blocks, 0)


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """Four bits about 8."""
    return (nibbles(integers(blocks, 2, 18)) - 8).float() * half(blocks, 0)


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """Four bits above a minimum."""
    return nibbles(integers(blocks, 4, 20)).float() * half(blocks, 0) + half(blocks, 2)


def q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """Five bits about 16; the fifth bits stand together."""
    high = fields(integers(blocks, 2, 6), 1)
    return ((nibbles(integers(blocks, 6, 22)) | high << 4) - 16).float() * half(blocks, 0)


def q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """Five bits above a minimum."""
    high = fields(integers(blocks, 4, 8), 1)
    return (nibbles(integers(blocks, 8, 24)) | high << 4).float() * half(blocks, 0) + half(blocks, 2)


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Signed bytes."""
    return blocks[:, 2:].view(torch.int8).float() * half(blocks, 0)


def tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    """Five ternary digits to a byte, read off the top of the byte times a power of three."""
    digits = []
    for start, stop, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        octets = integers(blocks, start, stop)
        digits += [((octets * 3**power & 255) * 3) >> 8 for power in range(count)]
    return (torch.cat(digits, dim=-1) - 1).float() * half(blocks, 52)


def tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    """Ternary digits of two bits."""
    octets = grouped(integers(blocks, 0, 64), 2, 32)
    return (planes(octets, 2).flatten(1) - 1).float() * half(blocks, 64)


def mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """E2M1 numbers with a power of two per block (OCP Microscaling Formats 1.0)."""
    exponent = integers(blocks, 0, 1)
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return codebook("MXFP4", blocks.device)[nibbles(integers(blocks, 1, 17))].squeeze(-1) * bits.view(torch.float32)


def nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    """E2M1 numbers with an unsigned E4M3 scale for each 16; the codebook is doubled, hence the half."""
    code = integers(blocks, 0, 4)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = ((exponent + 120 << 23) | mantissa << 20).view(torch.float32)
    scale = torch.where(exponent == 0, mantissa.float() * 2.0**-9, normal) * 0.5
    scale = torch.where((code == 0) | (code == 0x7F), 0.0, scale)
    octets = grouped(integers(blocks, 4, 36), 4, 8)
    values = codebook("MXFP4", blocks.device)[nibbles(octets)].squeeze(-1)
    return (values * scale.unsqueeze(-1)).flatten(1)


def iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    """Four bits into sixteen unevenly spaced values."""
    return codebook("IQ4_NL", blocks.device)[nibbles(integers(blocks, 2, 18))].squeeze(-1) * half(blocks, 0)
