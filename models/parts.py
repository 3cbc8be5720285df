"""Matrices as ranges of rows: what moves at once must not be large, and rows are computed one by one anyway.

Movable parts are whole groups of `ROW_GROUP` rows: then no kernel's tile straddles two of them, and a matrix computed in
parts has the bits of the same matrix computed at once, so that a budget may decide which of the two happens.
"""

from __future__ import annotations

from typing import Final

from offload.config import HEAD_PART_BYTES, PART_BYTES
from offload.models.checkpoint.base import TensorInfo
from offload.units import align_down, align_up

ROW_GROUP: Final = 64


def movable_parts(matrix: TensorInfo, most_bytes: int = PART_BYTES) -> tuple[TensorInfo, ...]:
    """The matrix as nearly equal ranges of rows of at most `most_bytes` each; as one where its rows are no whole groups.

    Matrices of which there is one for each head move together.
    """
    whole = len(matrix.shape) > 2 or matrix.shape[0] % ROW_GROUP
    return (matrix,) if whole else _row_ranges(matrix, most_bytes)


def head_parts(head: TensorInfo, most_bytes: int = HEAD_PART_BYTES) -> dict[str, TensorInfo]:
    """The output matrix as ranges of rows of at most `most_bytes` each, by name: always computed one by one."""
    num_rows = head.shape[0]
    whole = align_down(num_rows, ROW_GROUP)
    if head.nbytes <= min(most_bytes, PART_BYTES) or whole in (0, num_rows):
        parts = _row_ranges(head, most_bytes)
    else:  # rows that are no whole group stand alone, and the others can move in parts
        parts = (*_row_ranges(head.rows(0, whole), most_bytes), head.rows(whole, num_rows))
    return {"output.weight": head} if len(parts) == 1 else {f"output.weight[{i}]": part for i, part in enumerate(parts)}


def _row_ranges(matrix: TensorInfo, most_bytes: int) -> tuple[TensorInfo, ...]:
    num_rows = matrix.shape[0]
    most = max(ROW_GROUP, align_down(most_bytes // matrix.row_nbytes, ROW_GROUP))
    count = -(-num_rows // most)
    if count == 1:
        return (matrix,)
    rows = align_up(-(-num_rows // count), ROW_GROUP)
    return tuple(matrix.rows(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))
