"""Token ids to float32 rows: the token table is read a row at a time, from memory if it is pinned, else from disk.

A row costs one read of one or two pages, so the table never needs to be resident: that is up to a gigabyte for large
vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt

from offload.blocks import Extent
from offload.errors import UsageError
from offload.kernels.batch import Floats
from offload.kernels.ggml.dequantize import dequantize
from offload.models.checkpoint.base import TensorInfo
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken, Reader
from offload.tiers.ram import Slab
from offload.units import PAGE, align_up


class EmbeddingTable:
    """Looks up rows of `table`, [vocab_size, hidden_size] of any element type, and multiplies them by `scale`.

    `reader` must be the table's own: its small reads must not queue behind megabytes of weights.
    """

    def __init__(
        self, table: TensorInfo, scale: float, reader: Reader, scratch_rows: int, telemetry: Telemetry
    ) -> None:
        self._table = table
        self._telemetry = telemetry
        self._scale = np.float32(scale)
        self._reader = reader
        self._row_window = align_up(table.row_nbytes) + PAGE
        self._scratch = Slab(scratch_rows * self._row_window, huge_pages=False, prefault=False)
        self._resident: npt.NDArray[np.uint8] | None = None

    @staticmethod
    def scratch_nbytes(table: TensorInfo, scratch_rows: int) -> int:
        """Bytes of memory that the table's reader needs."""
        return scratch_rows * (align_up(table.row_nbytes) + PAGE)

    def place(self, rows: memoryview) -> None:
        """The whole table is in memory, as these bytes."""
        self._resident = np.frombuffer(rows, dtype=np.uint8).reshape(self._table.shape[0], self._table.row_nbytes)

    def rows(self, tokens: Sequence[int], cancel: CancelToken | None = None) -> Floats:
        """[len(tokens), hidden_size] float32.

        Raises:
            UsageError: a token id outside of the vocabulary.
            StorageError: a row could not be read.
        """
        vocab, hidden = self._table.shape
        if tokens and (min(tokens) < 0 or max(tokens) >= vocab):
            raise UsageError(f"token ids must lie in 0 .. {vocab - 1}; got {min(tokens)} .. {max(tokens)}")
        ids = np.asarray(tokens, dtype=np.int64)
        raw = self._resident[ids] if self._resident is not None else self._read(ids, cancel)
        values = dequantize(np.ascontiguousarray(raw).reshape(-1), self._table.element, ids.size * hidden)
        if self._scale != 1:
            values *= self._scale
        return values.reshape(ids.size, hidden)

    def release_scratch(self) -> None:
        """Gives back the memory into which rows are read; the next rows take it anew."""
        self._scratch.discard(0, self._scratch.nbytes)

    def close(self) -> None:
        """Frees the scratch memory. Idempotent."""
        self._resident = None
        self._scratch.close()

    def _read(self, ids: npt.NDArray[np.int64], cancel: CancelToken | None) -> npt.NDArray[np.uint8]:
        unique, places = np.unique(ids, return_inverse=True)
        size = self._table.row_nbytes
        rows = np.empty((unique.size, size), dtype=np.uint8)
        capacity = self._scratch.nbytes // self._row_window
        for start in range(0, unique.size, capacity):
            self._read_some(unique[start : start + capacity], rows[start : start + capacity], cancel)
        return rows[places]

    def _read_some(self, ids: npt.NDArray[np.int64], rows: npt.NDArray[np.uint8], cancel: CancelToken | None) -> None:
        size, base = self._table.row_nbytes, self._table.extent
        requests = [
            (
                Extent(path=base.path, offset=base.offset + int(token) * size, nbytes=size),
                self._scratch.view(place * self._row_window, self._row_window),
            )
            for place, token in enumerate(ids)
        ]
        try:
            (handle,) = self._reader.read_groups([requests])
            asked = perf_counter()
            handle.wait(cancel)
            self._telemetry.waited("token rows", asked, perf_counter())
            for place, (extent, view) in enumerate(requests):
                rows[place] = np.frombuffer(view, np.uint8, size, extent.lead)
        except BaseException:
            self._reader.cancel_pending()
            self._reader.drain()  # nobody may write into the scratch rows any more
            raise
