"""Products with quantized matrices, and their values, straight from the bytes of an arena or of slots.

    vector     out[t, r] = sum over k of value(r, k) * x[t, k]     a program for some rows and one token: every byte is read
                                                                    once for a token, decoded in registers, and forgotten
    experts    the same, where token t has a matrix of its own: the one in slot[t]
    values     float32, float16 or bfloat16, for products with many tokens by the vendor's kernels

Rows lie one behind the other, a whole number of blocks each. Called from one thread.
"""

from __future__ import annotations

from math import prod
from typing import Final

import torch
import triton
import triton.language as tl

from offload.elements import ElementType
from offload.kernels.triton.blocks import FORMATS

ROWS: Final = 8  # of a program: enough that its loads hide each other, few enough that small matrices fill a card
STEP_ELEMENTS: Final = 256  # of a row, decoded at a time
VALUES_BLOCKS: Final = 4096  # elements of a program that writes values
SUPPORTED: Final = frozenset(FORMATS)
"""Names of the element types that have kernels."""


@triton.jit
def _product(
    x, matrices, slots, out, num_rows, num_blocks, x_stride, slot_bytes,
    decode: tl.constexpr, order: tl.constexpr, block_elements: tl.constexpr, block_bytes: tl.constexpr,
    rows: tl.constexpr, step: tl.constexpr, has_slots: tl.constexpr,
):  # fmt: skip
    """`rows` rows of one token's product; `step` blocks of each at a time, the last ones masked by zeros in x."""
    token = tl.program_id(1)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    start = matrices
    if has_slots:
        start += tl.load(slots + token).to(tl.int64) * slot_bytes
    first = start + tl.minimum(row, num_rows - 1).to(tl.int64) * num_blocks * block_bytes
    place = tl.arange(0, step * block_elements)
    ahead = place // block_elements
    element = ahead * block_elements + order(place % block_elements)
    total = tl.zeros((rows,), tl.float32)
    for block in range(0, num_blocks, step):
        number = tl.minimum(block + tl.arange(0, step), num_blocks - 1)
        addresses = (first[:, None] + number[None, :] * block_bytes).reshape(rows * step)
        values = decode(addresses).reshape(rows, step * block_elements)
        here = block + ahead < num_blocks
        factors = tl.load(x + token * x_stride + block * block_elements + element, mask=here, other=0.0)
        total += tl.sum(tl.where(here[None, :], values * factors[None, :], 0.0), axis=1)
    tl.store(out + token * num_rows + row, total, mask=row < num_rows)


@triton.jit
def _values(
    blocks, out, num_blocks,
    decode: tl.constexpr, order: tl.constexpr, block_elements: tl.constexpr, block_bytes: tl.constexpr,
    count: tl.constexpr,
):  # fmt: skip
    """The values of `count` blocks."""
    block = tl.program_id(0) * count + tl.arange(0, count)
    inside = tl.minimum(block, num_blocks - 1).to(tl.int64)
    values = decode(blocks + inside * block_bytes)
    element = order(tl.arange(0, block_elements))
    target = out + inside[:, None] * block_elements + element[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=(block < num_blocks)[:, None])


def product(x: torch.Tensor, raw: torch.Tensor, element: ElementType, shape: tuple[int, int]) -> torch.Tensor:
    """The product of a few tokens with a stored matrix, float32 [tokens, out_features].

    Args:
        x: float32 [tokens, in_features]. raw: uint8, the matrix as stored. shape: (out_features, in_features).
    """
    assert raw.numel() >= shape[0] * element.row_bytes(shape[1]), (raw.numel(), element, shape)
    return _launch(x, x.shape[0], raw, None, 0, element, shape)


def expert_products(
    x: torch.Tensor, slots: torch.Tensor, bank: torch.Tensor, offset: int, stride: int, element: ElementType,
    shape: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """The products of chosen experts, float32 [chosen, out_features], each with the matrix in its slot.

    Args:
        x: float32 [chosen, in_features], or [1, in_features] for all of them. slots: int32 [chosen], on the device.
        bank: uint8, slots of `stride` bytes in which the matrix begins at `offset`.
    """
    assert x.shape[0] in (1, slots.numel()), (x.shape, slots.shape)
    return _launch(x, slots.numel(), bank[offset:], slots, stride, element, shape)


def _launch(
    x: torch.Tensor, count: int, matrices: torch.Tensor, slots: torch.Tensor | None, stride: int,
    element: ElementType, shape: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    assert x.dtype == torch.float32 and x.shape[1] == shape[1], (x.dtype, x.shape, shape)
    x = x.contiguous()
    out = torch.empty((count, shape[0]), dtype=torch.float32, device=x.device)
    form, num_blocks = FORMATS[element.name], shape[1] // element.block_elements
    step = max(1, STEP_ELEMENTS // element.block_elements)
    _product[(triton.cdiv(shape[0], ROWS), count)](
        x, matrices, matrices if slots is None else slots, out, shape[0], num_blocks,
        0 if x.shape[0] == 1 else x.stride(0), stride,
        decode=form.decode, order=form.order, block_elements=element.block_elements, block_bytes=element.block_bytes,
        rows=ROWS, step=step, has_slots=slots is not None,
    )  # fmt: skip
    return out


def values(
    raw: torch.Tensor, element: ElementType, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values of a stored tensor, with the bits of ggml's own conversion when `dtype` is float32."""
    out = torch.empty(shape, dtype=dtype, device=raw.device)
    form, num_blocks = FORMATS[element.name], prod(shape) // element.block_elements
    count = max(1, VALUES_BLOCKS // element.block_elements)
    _values[(triton.cdiv(num_blocks, count),)](
        raw, out, num_blocks,
        decode=form.decode, order=form.order, block_elements=element.block_elements, block_bytes=element.block_bytes,
        count=count,
    )  # fmt: skip
    return out
