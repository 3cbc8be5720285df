"""Products with quantized matrices, and their values, straight from the bytes of an arena or of slots.

    vector     out[t, r] = sum over k of value(r, k) * x[t, k]     a program for some rows and one token: every byte is read
                                                                    once for a token, decoded in registers, and forgotten
    experts    the same, where token t has a matrix of its own: the one in slot[t]
    values     float32, float16 or bfloat16, for products with many tokens by the vendor's kernels

Rows lie one behind the other, a whole number of blocks each. Where there are scales, a product adds up elements that
have one in common, and multiplies the sum. Called from one thread.
"""

from __future__ import annotations

from math import gcd, prod
from typing import Final

import torch
import triton
import triton.language as tl

from offload.elements import F8_E4M3, ElementType
from offload.kernels.torch.scales import BlockScales
from offload.kernels.triton.blocks import F8_16, F8_TOGETHER, FORMATS, Format

ROWS: Final = 8  # of a program: enough that its loads hide each other, few enough that small matrices fill a card
STEP_ELEMENTS: Final = 256  # of a row, decoded at a time
VALUES_BLOCKS: Final = 4096  # elements of a program that writes values
SUPPORTED: Final = frozenset(FORMATS)
"""Names of the element types that have kernels."""


@triton.jit
def _product(
    x, matrices, slots, scales, out, num_rows, num_blocks, x_stride, slot_bytes,
    scale_rows, scale_columns, grid_columns, grid_stride,
    decode: tl.constexpr, order: tl.constexpr, block_elements: tl.constexpr, block_bytes: tl.constexpr,
    rows: tl.constexpr, step: tl.constexpr, has_slots: tl.constexpr, has_scales: tl.constexpr,
):  # fmt: skip
    """`rows` rows of one token's product; `step` blocks of each at a time, the last ones masked by zeros in x."""
    token = tl.program_id(1)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    start = matrices
    if has_slots:
        start += tl.load(slots + token).to(tl.int64) * slot_bytes
    inside = tl.minimum(row, num_rows - 1)
    first = start + inside.to(tl.int64) * num_blocks * block_bytes
    scale = scales + token * grid_stride + inside // scale_rows * grid_columns
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
        part = tl.sum(tl.where(here[None, :], values * factors[None, :], 0.0), axis=1)
        if has_scales:  # the elements of a step have one
            part *= tl.load(scale + block * block_elements // scale_columns)
        total += part
    tl.store(out + token * num_rows + row, total, mask=row < num_rows)


@triton.jit
def _values(
    blocks, scales, out, num_blocks, num_columns, scale_rows, scale_columns, grid_columns,
    decode: tl.constexpr, order: tl.constexpr, block_elements: tl.constexpr, block_bytes: tl.constexpr,
    count: tl.constexpr, has_scales: tl.constexpr,
):  # fmt: skip
    """The values of `count` blocks."""
    block = tl.program_id(0) * count + tl.arange(0, count)
    inside = tl.minimum(block, num_blocks - 1).to(tl.int64)
    values = decode(blocks + inside * block_bytes)
    first = inside * block_elements
    if has_scales:  # the elements of a block have one
        row, column = first // num_columns, first % num_columns
        values *= tl.load(scales + row // scale_rows * grid_columns + column // scale_columns)[:, None]
    element = order(tl.arange(0, block_elements))
    tl.store(
        out + first[:, None] + element[None, :], values.to(out.dtype.element_ty), mask=(block < num_blocks)[:, None]
    )


def product(
    x: torch.Tensor, raw: torch.Tensor, element: ElementType, shape: tuple[int, int], scales: BlockScales | None = None
) -> torch.Tensor:
    """The product of a few tokens with a stored matrix, float32 [tokens, out_features].

    Args:
        x: float32 [tokens, in_features]. raw: uint8, the matrix as stored. shape: (out_features, in_features).
    """
    assert raw.numel() >= shape[0] * element.row_bytes(shape[1]), (raw.numel(), element, shape)
    return _launch(x, x.shape[0], raw, None, 0, element, shape, scales)


def expert_products(
    x: torch.Tensor, slots: torch.Tensor, bank: torch.Tensor, offset: int, stride: int, element: ElementType,
    shape: tuple[int, int], scales: BlockScales | None = None,
) -> torch.Tensor:  # fmt: skip
    """The products of chosen experts, float32 [chosen, out_features], each with the matrix in its slot.

    Args:
        x: float32 [chosen, in_features], or [1, in_features] for all of them. slots: int32 [chosen], on the device.
        bank: uint8, slots of `stride` bytes in which the matrix begins at `offset`. scales: a grid for each of the chosen.
    """
    assert x.shape[0] in (1, slots.numel()), (x.shape, slots.shape)
    return _launch(x, slots.numel(), bank[offset:], slots, stride, element, shape, scales)


def _launch(
    x: torch.Tensor, count: int, matrices: torch.Tensor, slots: torch.Tensor | None, stride: int,
    element: ElementType, shape: tuple[int, int], scales: BlockScales | None,
) -> torch.Tensor:  # fmt: skip
    assert (element == F8_E4M3) == (scales is not None), element
    assert x.dtype == torch.float32 and x.shape[1] == shape[1], (x.dtype, x.shape, shape)
    x = x.contiguous()
    out = torch.empty((count, shape[0]), dtype=torch.float32, device=x.device)
    grid, scale_rows, scale_columns, grid_columns = _scales(scales, out)
    together = STEP_ELEMENTS if grid_columns == 1 else gcd(STEP_ELEMENTS, scale_columns)
    form, block_elements, block_bytes = _form(element, gcd(shape[1], together))
    num_blocks, step = shape[1] // block_elements, max(1, together // block_elements)
    _product[(triton.cdiv(shape[0], ROWS), count)](
        x, matrices, matrices if slots is None else slots, grid, out, shape[0], num_blocks,
        0 if x.shape[0] == 1 else x.stride(0), stride,
        scale_rows, scale_columns, grid_columns, 0 if grid.dim() < 3 else grid.stride(0),
        decode=form.decode, order=form.order, block_elements=block_elements, block_bytes=block_bytes,
        rows=ROWS, step=step, has_slots=slots is not None, has_scales=scales is not None, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _form(element: ElementType, columns: int) -> tuple[Format, int, int]:
    """How rows that are whole multiples of `columns` are decoded, and of how many elements and bytes a block is."""
    if element == F8_E4M3 and columns % F8_TOGETHER == 0:
        return F8_16, F8_TOGETHER, F8_TOGETHER
    return FORMATS[element.name], element.block_elements, element.block_bytes


def _scales(scales: BlockScales | None, unused: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """Grid, rows and columns of a block, blocks in a row: what kernels get, also where they look at none of it."""
    if scales is None:
        return unused, 1, 1, 1
    assert scales.grid.is_contiguous() and scales.grid.dtype == torch.float32, scales.grid
    return scales.grid, scales.rows, scales.columns, scales.grid.shape[-1]


def values(
    raw: torch.Tensor, element: ElementType, shape: tuple[int, ...], dtype: torch.dtype = torch.float32,
    scales: BlockScales | None = None,
) -> torch.Tensor:  # fmt: skip
    """The values of a stored tensor, with the bits of ggml's own conversion when `dtype` is float32.

    In FP8: code times scale, rounded once to float32, which are the bits of torch.
    """
    assert (element == F8_E4M3) == (scales is not None), element
    out = torch.empty(shape, dtype=dtype, device=raw.device)
    grid, scale_rows, scale_columns, grid_columns = _scales(scales, out)
    form, block_elements, block_bytes = _form(element, gcd(shape[-1], scale_columns))
    num_blocks, count = prod(shape) // block_elements, max(1, VALUES_BLOCKS // block_elements)
    _values[(triton.cdiv(num_blocks, count),)](
        raw, grid, out, num_blocks, shape[-1], scale_rows, scale_columns, grid_columns,
        decode=form.decode, order=form.order, block_elements=block_elements, block_bytes=block_bytes,
        count=count, has_scales=scales is not None, enable_fp_fusion=False,  # the bits are those of separate steps
    )  # fmt: skip
    return out
