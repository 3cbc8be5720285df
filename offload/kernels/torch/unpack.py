"""Bits and fields out of blocks of bytes, the vocabulary that the decoders of quantized types are written in.

Legend: n blocks; every function works along the last dimension.
"""

from __future__ import annotations

import torch


def half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 at a byte offset of every block, as float32 [n, 1]."""
    return blocks[:, offset : offset + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def integers(blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Unsigned bytes [start, stop) of every block, as int32 so that they can be shifted."""
    return blocks[:, start:stop].int()


def words(octets: torch.Tensor, size: int) -> torch.Tensor:
    """Little-endian unsigned numbers of `size` bytes: [..., k * size] -> int64 [..., k]."""
    split = octets.long().reshape(*octets.shape[:-1], -1, size)
    return (split << arange(size, split, 8)).sum(-1)


def grouped(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    """The last dimension as several."""
    return x.reshape(*x.shape[:-1], *sizes)


def arange(count: int, like: torch.Tensor, step: int = 1) -> torch.Tensor:
    """0, step, 2 * step, ... of the type and device of `like`."""
    return torch.arange(0, count * step, step, dtype=like.dtype, device=like.device)


def nibbles(octets: torch.Tensor) -> torch.Tensor:
    """All low halves, then all high halves: [..., k] -> [..., 2 * k]."""
    return torch.cat((octets & 15, octets >> 4), dim=-1)


def fields(octets: torch.Tensor, bits: int) -> torch.Tensor:
    """Every field of every byte, lowest first: [..., k] -> [..., k * 8 / bits]."""
    return ((octets.unsqueeze(-1) >> arange(8 // bits, octets, bits)) & ((1 << bits) - 1)).flatten(-2)


def planes(octets: torch.Tensor, bits: int) -> torch.Tensor:
    """The lowest field of all bytes, then the next of all: [..., k] -> [..., 8 / bits, k]."""
    shifts = arange(8 // bits, octets, bits).unsqueeze(-1)
    return (octets.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)
