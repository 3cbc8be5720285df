"""The inputs of a micro-batch's graphs: positions, cache rows, output rows and attention masks, as ggml wants them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from offload.config import KV_BUCKET
from offload.kernels.batch import MicroBatch


def bucket(kv_length: int, ctx: int) -> int:
    """The KV length that graphs for `kv_length` are built with; `ctx` must be a multiple of the bucket."""
    return min(ctx, -(-kv_length // KV_BUCKET) * KV_BUCKET)


class BatchInputs:
    """Arrays that the graphs of one micro-batch read. They must stay alive while its graphs run."""

    def __init__(self, batch: MicroBatch, kv_length: int, windows: Iterable[int | None]) -> None:
        self.batch = batch
        self.kv_length = kv_length
        self.positions = np.arange(batch.start, batch.start + batch.num_tokens, dtype=np.int32)
        self.rows = self.positions.astype(np.int64)
        # a graph without outputs still ends in one row, which nobody reads
        self.outputs = np.array(batch.outputs or (0,), dtype=np.int32)
        self.masks = {window: _mask(self.positions, kv_length, window) for window in windows}
        self.addresses = {name: getattr(self, name).ctypes.data for name in ("positions", "rows", "outputs")}
        self.mask_addresses = {window: mask.ctypes.data for window, mask in self.masks.items()}


def _mask(positions: npt.NDArray[np.int32], kv_length: int, window: int | None) -> npt.NDArray[np.float16]:
    """[num_tokens, kv_length]: 0 where a query may look, -inf elsewhere."""
    keys = np.arange(kv_length, dtype=np.int32)
    visible = keys[None, :] <= positions[:, None]
    if window is not None:
        visible &= keys[None, :] > positions[:, None] - window
    mask: npt.NDArray[np.float16] = np.where(visible, np.float16(0), np.float16(-np.inf))
    return mask
