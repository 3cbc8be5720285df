"""Codebooks of the types that have one, read out of ggml at run time: blocks that name every entry, with scale one.

Asking the library instead of keeping a copy means that both sides of a comparison use the same table.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from offload.elements import element_type
from offload.kernels.ggml.dequantize import dequantize

_ONE = (0x00, 0x3C)  # 1.0 as float16, little-endian


@cache
def codebook(name: str, device: torch.device) -> torch.Tensor:
    """Entries of the codebook of a type, float32 [num_entries, entry_elements], on `device`."""
    probe, entry_elements, scale, shift = {
        "IQ4_NL": (_nibble_probe(18, _ONE), 1, 1.0, 0.0),
        "MXFP4": (_nibble_probe(17, (0x80,)), 1, 1.0, 0.0),
        "IQ2_XXS": (_iq2_xxs_probe(), 8, 0.125, 0.0),
        "IQ2_XS": (_iq2_xs_probe(), 8, 0.125, 0.0),
        "IQ2_S": (_split_probe(82, 1024, 32, 66, 0x55), 8, 0.125, 0.0),
        "IQ3_XXS": (_split_probe(98, 256, 64), 4, 0.25, 0.0),
        "IQ3_S": (_split_probe(110, 512, 64, 66, 0xFF), 4, 1.0, 0.0),
        "IQ1_S": (_iq1_s_probe(), 8, 1.0, 0.125),
    }[name]
    element = element_type(name)
    values = dequantize(probe, element, probe.size // element.block_bytes * element.block_elements)
    entries = torch.from_numpy((values / scale - shift).reshape(-1, entry_elements))
    return entries[:16].to(device) if entry_elements == 1 else entries.to(device)


def _nibble_probe(block_bytes: int, head: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """One block whose first sixteen elements are the sixteen entries."""
    block = np.zeros(block_bytes, dtype=np.uint8)
    block[: len(head)] = head
    block[len(head) :] = np.arange(16)
    return block


def _blocks(block_bytes: int, num_entries: int, per_block: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Empty blocks of scale one, and the entries that each shall name."""
    blocks = np.zeros((num_entries // per_block, block_bytes), dtype=np.uint8)
    blocks[:, :2] = _ONE
    return blocks, np.arange(num_entries).reshape(-1, per_block)


def _split_probe(
    block_bytes: int, num_entries: int, per_block: int, high_at: int = 0, spread: int = 0
) -> npt.NDArray[np.uint8]:
    """Indices of eight bits from byte 2; higher bits, alike within a super-group, in eight bytes from `high_at`."""
    blocks, index = _blocks(block_bytes, num_entries, per_block)
    blocks[:, 2 : 2 + per_block] = index & 255
    if high_at:
        blocks[:, high_at : high_at + 8] = (index[:, :: per_block // 8] >> 8) * spread
    return blocks.reshape(-1)


def _iq2_xxs_probe() -> npt.NDArray[np.uint8]:
    blocks, index = _blocks(66, 256, 32)
    fields = np.zeros((len(blocks), 8, 8), dtype=np.uint8)
    fields[:, :, :4] = index.reshape(-1, 8, 4)
    blocks[:, 2:] = fields.reshape(-1, 64)
    return blocks.reshape(-1)


def _iq2_xs_probe() -> npt.NDArray[np.uint8]:
    blocks, index = _blocks(74, 512, 32)
    blocks[:, 2:66] = index.astype("<u2").view(np.uint8)
    return blocks.reshape(-1)


def _iq1_s_probe() -> npt.NDArray[np.uint8]:
    blocks, index = _blocks(50, 2048, 32)
    blocks[:, 2:34] = index & 255
    blocks[:, 34:] = ((index[:, ::4] >> 8) * 0o1111).astype("<u2").view(np.uint8)
    return blocks.reshape(-1)
