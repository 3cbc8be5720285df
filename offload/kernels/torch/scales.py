"""Scales of matrices that have them: factors that lie apart from the elements, one for each block of rows and columns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from offload.kernels.torch.routing import Weights
from offload.models.checkpoint.base import TensorInfo


class BlockScales(NamedTuple):
    """
    Attributes:
        grid: float32 [row blocks, column blocks], or one such for each of several matrices. Contiguous.
        rows, columns: elements of a block; the last blocks of a matrix may be cut off.
    """

    grid: torch.Tensor
    rows: int
    columns: int

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Multiplies the elements [out_features, in_features] of a matrix in place; nothing as large is made beside them."""
        num_rows, num_columns = values.shape
        by_row = self.grid.repeat_interleave(self.rows, dim=0)[:num_rows]
        whole = num_columns // self.columns
        edge = whole * self.columns
        values[:, :edge].view(num_rows, whole, self.columns).mul_(by_row[:, :whole, None])
        values[:, edge:].mul_(by_row[:, whole:])
        return values


def scales_of(info: TensorInfo, weights: Weights, numbers: torch.Tensor | None = None) -> BlockScales | None:
    """Those of a matrix, None where it has none; or of the same matrix of several experts, by `numbers`, int64 [n]."""
    if info.scales is None:
        return None
    vector, number, rows, columns = info.scales
    grids = weights(vector).reshape(-1, *info.scales.grid(info.shape))
    return BlockScales(grids[number] if numbers is None else grids.index_select(0, numbers), rows, columns)
