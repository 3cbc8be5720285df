"""Quantized weights in two halves of their bits: a coarse copy from the high ones, the exact bytes again with the rest.

    block of a file    [ scales | quants q = high . low ]
    high plane         [ scales | high bits of all quants ]         computed as if every low half were in the middle
    low plane          [ low bits of all quants ]                   turns a coarse copy into the original, bit for bit

Both halves of a quant's bits are of equal number: 4 and 4 (Q8_0), 2 and 2 (Q4_0, Q4_K), 4 and 2 (Q6_K). What comes out is a
block of the same type, which the same kernel computes. As in D2MoE's matryoshka weights, arXiv 2504.15299. Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from offload.elements import ElementType
from offload.errors import UnsupportedError
from offload.kernels.batch import Bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the quants of a block are that are split, and how.

    Attributes:
        start, count: their bytes; the first half of them is A, the second B. All other bytes belong to the high plane.
        mask: the high bits of a byte. shift: by how much B's move to fill the gaps between A's.
        middle: low bits in the middle of what they can be, for a coarse copy; two quants of a byte err in both directions.
    """

    start: int
    count: int
    mask: int
    shift: int
    middle: int


_LAYOUTS: Final = {
    "Q8_0": Layout(2, 32, 0xF0, 4, 0x08),
    "Q4_0": Layout(2, 16, 0xCC, 2, 0x12),
    "Q4_K": Layout(16, 128, 0xCC, 2, 0x12),
    "Q6_K": Layout(0, 128, 0xCC, 2, 0x12),
}
SUPPORTED: Final = tuple(_LAYOUTS)


def plane_bytes(element: ElementType) -> tuple[int, int]:
    """Bytes of a block's high and low plane.

    Raises:
        UnsupportedError: blocks of this type are not split.
    """
    low = _layout(element).count // 2
    return element.block_bytes - low, low


def split(blocks: Bytes, element: ElementType) -> tuple[Bytes, Bytes]:
    """High and low planes of blocks [n, block_bytes]."""
    layout = _layout(element)
    first, second, others = _parts(blocks, layout)
    high, low = np.uint8(layout.mask), np.uint8(~layout.mask & 0xFF)
    packed = (first & high) | ((second & high) >> layout.shift)
    rest: Bytes = (first & low) | ((second & low) << layout.shift)
    return np.concatenate([others, packed], axis=1), rest


def expand(high: Bytes, element: ElementType, blocks: Bytes) -> None:
    """Writes coarse blocks [n, block_bytes] from their high planes."""
    layout = _layout(element)
    first, second, _ = _parts(blocks, layout)
    others, packed = high[:, : -first.shape[1]], high[:, -first.shape[1] :]
    blocks[:, : layout.start] = others[:, : layout.start]
    blocks[:, layout.start + layout.count :] = others[:, layout.start :]
    np.bitwise_or(packed & layout.mask, layout.middle, out=first)
    np.bitwise_or((packed << layout.shift) & layout.mask, layout.middle, out=second)


def refine(blocks: Bytes, low: Bytes, element: ElementType) -> None:
    """Turns coarse blocks into the original, in place, by their low planes."""
    layout = _layout(element)
    first, second, _ = _parts(blocks, layout)
    rest = ~layout.mask & 0xFF
    first &= layout.mask
    first |= low & rest
    second &= layout.mask
    second |= (low >> layout.shift) & rest


def _layout(element: ElementType) -> Layout:
    layout = _LAYOUTS.get(element.name)
    if layout is None:
        raise UnsupportedError(f"{element.name}: its bits cannot be split; a pack is made of {', '.join(SUPPORTED)}")
    return layout


def _parts(blocks: Bytes, layout: Layout) -> tuple[Bytes, Bytes, Bytes]:
    """The two halves of the quants, as views, and a copy of all other bytes."""
    middle, end = layout.start + layout.count // 2, layout.start + layout.count
    others = np.concatenate([blocks[:, : layout.start], blocks[:, end:]], axis=1)
    return blocks[:, layout.start : middle], blocks[:, middle:end], others
