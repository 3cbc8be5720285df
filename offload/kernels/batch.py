"""What a backend is asked to compute: micro-batches of tokens, pieces of passes, and the protocol that runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from offload.blocks import BlockKey
from offload.tiers.base import CancelToken

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


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
    """What a pass computes without a wait in between, once its `streamed` blocks are there; `pinned` counts the others.

    Attributes:
        mixes: the layer whose experts must have been computed before; or None.
        routes: the layer whose experts have been chosen afterwards; or None.
    """

    name: str
    pinned: int
    streamed: tuple[BlockKey, ...]
    mixes: int | None = None
    routes: int | None = None


class ExpertPlace(NamedTuple):
    """Where experts of a layer can lie: in `num_slots` slots, `stride` bytes apart, the first one at `address`.

    Attributes:
        offsets: of the gate, up and down matrices in a slot.
        is_resident: slot i holds expert i, always; they are then computed with the rest of the pass.
    """

    address: int
    stride: int
    num_slots: int
    offsets: tuple[int, int, int]
    is_resident: bool


class Foresight(NamedTuple):
    """What passes guess of choices to come.

    Attributes:
        lookahead: layers with experts that are looked ahead at each. width: experts that are named for each, best first.
        in_prompts: whether passes of many tokens guess too.
    """

    lookahead: int = 0
    width: int = 0
    in_prompts: bool = False

    def looks(self, num_tokens: int) -> int:
        """How many layers a pass of so many tokens looks ahead."""
        return self.lookahead if num_tokens == 1 or self.in_prompts else 0


class Backend(Protocol):
    """Runs passes of one model, piece by piece. Called from one thread only; holds the KV cache and the hidden states."""

    name: str

    def place(self, key: BlockKey, address: int) -> None:
        """Says where a block now lies (backends that compute in place)."""
        ...

    def place_experts(self, layer: int, place: ExpertPlace) -> None:
        """Says where the experts of a layer can lie; before `schedule`."""
        ...

    def set_foresight(self, foresight: Foresight) -> None:
        """Has passes guess what later layers will choose; before `schedule`. Their routers must never be streamed."""
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

    def routed(self, batch: int, layer: int) -> Ints:
        """The experts that were chosen for the batch's tokens, int32 [num_tokens, num_used], best first; a view.

        Empty where the batch's tokens do not reach the layer.
        """
        ...

    def skip(self, batch: int, layer: int, below: float) -> int:
        """Leaves out the chosen experts whose share of a token's weights is smaller; tells how many.

        `routed` has -1 in their place then, and they count as having returned zeros.
        """
        ...

    def weights(self, batch: int, layer: int) -> Floats:
        """How the router weighs the chosen experts, float32 [num_tokens, num_used]; until the next layer's choice."""
        ...

    def foreseen(self, batch: int, layer: int, ahead: int) -> Ints:
        """What was guessed `ahead` layers before of a layer's choice, int32 [num_tokens, width], best first; a view.

        Empty where nothing was.
        """
        ...

    def compute_experts(self, batch: int, layer: int, slots: Mapping[int, int]) -> float:
        """Computes experts, given with the slots that they lie in, for what was sent to them; returns kernel seconds.

        Raises:
            Cancelled, BackendError: as `run`.
        """
        ...

    def logits(self, batch: int) -> Floats:
        """Logits of the batch's outputs after the last piece, [num_outputs, vocab_size] float32, a copy."""
        ...

    def cached_rows(self, layer: int, start: int, stop: int) -> Bytes:
        """What the KV cache holds of a layer's positions `[start, stop)`, [num_kv_heads, positions, bytes of a row], a copy.

        A row is the head's key and, where values are kept, its value behind it, in the cache's element type.
        """
        ...

    def restore_rows(self, layer: int, start: int, rows: Bytes) -> None:
        """Puts back what `cached_rows` gave, here or in another backend for the same model and type."""
        ...

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """A token that is looked at between kernels; None looks at nothing."""
        ...

    def close(self) -> None:
        """Frees everything. Idempotent."""
        ...
