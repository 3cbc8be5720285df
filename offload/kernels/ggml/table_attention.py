"""Attention of layers whose cache passes through a ring: head by head, each when its table is there.

In the graph of a pass the attention of all heads is one node, which has its place in the graph's memory. Pieces have a node
for each head of keys instead, which writes into that place what its group of query heads gets. Heads are computed apart in
either case, so the bits are the same.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final, NamedTuple

from offload.elements import ElementType
from offload.kernels.ggml.library import FLOAT_BYTES, PREC_F32, Library

TENSORS_PER_HEAD: Final = 12
Moving = tuple[ctypes.c_uint64, int]
"""A data pointer, and its distance from the start of the table that it moves with."""


class TableForm(NamedTuple):
    """How tables lie: element types and features of key and value, where values begin in a row (0: they are the leading
    features of keys), and bytes of a row."""

    key: ElementType
    value: ElementType
    key_dim: int
    value_dim: int
    value_start: int
    row_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """An attention node and what it was made from: nodes `[first, end)` of the graph store keys and values and attend.

    `query`, `key` and `value` are tensors [num_tokens, heads, features], `whole` is what all heads get.
    """

    layer: int
    first: int
    end: int
    query: int
    key: int
    value: int
    whole: int
    rows: int
    mask: int
    sinks: int | None
    scale: float
    softcap: float
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    kv_length: int


class Head(NamedTuple):
    """The nodes of one head of keys, and the data pointers that move with its table, by their distance from its start."""

    nodes: tuple[int, ...]
    cells: tuple[Moving, ...]


def head_nodes(lib: Library, context: int, one: Attended, form: TableForm, head: int) -> Head:
    """Stores the head's key and value into its table, and attends. The graph must have been allocated."""
    group = one.num_heads // one.num_kv_heads
    key_table = _table(lib, context, form, form.key, form.key_dim, one.kv_length)
    value_table = _table(lib, context, form, form.value, form.value_dim, one.kv_length)
    cells = [(lib.data_cell(key_table), 0), (lib.data_cell(value_table), form.value_start)]
    nodes = []
    stored = [(key_table, one.key, form.key_dim, 0)]
    if form.value_start:
        stored.append((value_table, one.value, form.value_dim, form.value_start))
    for table, fresh, dim, start in stored:
        _, head_stride, token_stride, _ = lib.strides(fresh)
        rows = lib.ggml_view_2d(context, fresh, dim, one.num_tokens, token_stride, head * head_stride)
        node = lib.ggml_set_rows(context, table, rows, one.rows)
        cells.append((lib.data_cell(node), start))
        nodes.append(node)
    _, head_stride, token_stride, _ = lib.strides(one.query)
    queries = lib.ggml_view_3d(
        context, one.query, form.key_dim, group, one.num_tokens, head_stride, token_stride, head * group * head_stride
    )
    node = lib.ggml_flash_attn_ext(
        context,
        lib.ggml_permute(context, queries, 0, 2, 1, 3),
        key_table,
        value_table,
        one.mask,
        one.scale,
        0.0,
        one.softcap,
    )
    if one.sinks is not None:
        sinks = lib.ggml_view_2d(context, one.sinks, group, 1, group * FLOAT_BYTES, head * group * FLOAT_BYTES)
        lib.ggml_flash_attn_ext_add_sinks(node, sinks)
    lib.ggml_prec_set_acc(node, PREC_F32)
    lib.widen(node, one.num_heads)
    lib.data_cell(node).value = lib.data_cell(one.whole).value + head * group * form.value_dim * FLOAT_BYTES
    for each in (*nodes, node):
        lib.mark(each, one.whole)
    return Head((*nodes, node), tuple(cells))


def _table(lib: Library, context: int, form: TableForm, element: ElementType, dim: int, length: int) -> int:
    tensor: int = lib.ggml_new_tensor_2d(context, element.ggml_id, dim, length)
    lib.set_strides(tensor, form.row_nbytes, form.row_nbytes * length, 1)
    return tensor
