"""What a backend is asked to compute: micro-batches of tokens, pieces of passes, and the protocol that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from offload.blocks import BlockKey
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


class Piece(NamedTuple):
    """What a pass computes without a wait in between, once its `streamed` blocks are there; `pinned` counts the others."""

    name: str
    pinned: int
    streamed: tuple[BlockKey, ...]


class Backend(Protocol):
    """Runs passes of one model, piece by piece. Called from one thread only; holds the KV cache and the hidden states."""

    name: str

    def place(self, key: BlockKey, address: int) -> None:
        """Says where a block now lies (backends that compute in place)."""
        ...

    def schedule(self, streamed: AbstractSet[BlockKey]) -> Sequence[Piece]:
        """Cuts the passes to come where these blocks have to arrive. All others must have been placed."""
        ...

    def begin(self, batches: Sequence[MicroBatch], hidden: Floats) -> None:
        """Starts a pass over `batches` with the embedded tokens, [total tokens, hidden_size] float32, copied."""
        ...

    def run(self, piece: int, batch: int) -> float:
        """Advances micro-batch number `batch` through a piece; returns the seconds spent inside kernels.

        Raises:
            Cancelled: the token asked for it in the middle of the computation.
            BackendError: a kernel failed.
        """
        ...

    def logits(self, batch: int) -> Floats:
        """Logits of the batch's outputs after the last piece, [num_outputs, vocab_size] float32, a copy."""
        ...

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """A token that is looked at between kernels; None looks at nothing."""
        ...

    def close(self) -> None:
        """Frees everything. Idempotent."""
        ...
