"""What a backend is asked to compute: micro-batches of tokens, segments of stages, and the protocol that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from offload.tiers.base import CancelToken

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Consecutive tokens that one graph computes: positions `[start, start + num_tokens)`.

    Attributes:
        outputs: rows, relative to `start`, whose logits are wanted.
    """

    start: int
    num_tokens: int
    outputs: tuple[int, ...] = ()

    @property
    def kv_length(self) -> int:
        """Positions that the last token attends to, itself included."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Segment:
    """Stages `[first, last)` of the model, run without a wait in between. `index` numbers segments in a schedule."""

    index: int
    first: int
    last: int


class Backend(Protocol):
    """Runs segments of one model. Called from one thread only; holds the KV cache and the hidden states."""

    name: str

    def place(self, name: str, address: int) -> None:
        """Says where matrix `name` now lies (backends that compute in place)."""
        ...

    def begin(self, batches: Sequence[MicroBatch], hidden: Floats) -> None:
        """Starts a pass over `batches` with the embedded tokens, [total tokens, hidden_size] float32, copied."""
        ...

    def run(self, segment: Segment, batch: int) -> float:
        """Advances micro-batch number `batch` through the segment; returns the seconds spent inside kernels.

        Raises:
            Cancelled: the token asked for it in the middle of the computation.
            BackendError: a kernel failed.
        """
        ...

    def logits(self, batch: int) -> Floats:
        """Logits of the batch's outputs after the last segment, [num_outputs, vocab_size] float32, a copy."""
        ...

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """A token that is looked at between kernels; None looks at nothing."""
        ...

    def close(self) -> None:
        """Frees everything. Idempotent."""
        ...
