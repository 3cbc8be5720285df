"""One forward pass: for each piece wait for its blocks, compute every micro-batch, let the blocks go.

Several micro-batches pass through a piece before the next one is fetched, so a pass reads each streamed block once,
however many tokens it carries; and each expert that any of them chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from time import perf_counter

from offload.blocks import BlockKey
from offload.expert_cache import ExpertCache
from offload.kernels.batch import Backend, Floats, MicroBatch, Piece
from offload.residency import Residency
from offload.sharing import Sharing
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken


class Scheduler:
    """Runs passes on one backend. Called from the driver thread only.

    Attributes:
        observer: called with the micro-batches of each pass that has ended.
    """

    def __init__(
        self,
        backend: Backend,
        residency: Residency,
        streamed: AbstractSet[BlockKey],
        telemetry: Telemetry,
        experts: ExpertCache | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        self._backend = backend
        self._residency = residency
        self._experts = experts
        self._sharing = sharing
        self._telemetry = telemetry
        self._streamed = streamed
        self._pieces: Sequence[Piece] | None = None
        self.observer: Callable[[Sequence[MicroBatch]], None] | None = None

    def set_streamed(self, streamed: AbstractSet[BlockKey]) -> None:
        """From the next pass on these blocks have to be waited for, and no others."""
        self._streamed = streamed
        self._pieces = None

    def reschedule(self) -> None:
        """The backend was told something that its graphs depend on."""
        self._pieces = None

    def forward(self, batches: Sequence[MicroBatch], hidden: Floats, cancel: CancelToken | None = None) -> None:
        """Computes `batches`, whose embedded tokens are `hidden`; logits are then at the backend.

        Raises:
            Cancelled, StorageError, BackendError: the pass did not end; the next one starts from the first block.
        """
        start = perf_counter()
        if self._pieces is None:
            self._pieces = self._backend.schedule(self._streamed)
        tokens = sum(batch.num_tokens for batch in batches)
        if self._sharing is not None:
            self._sharing.begin(tokens)
        self._backend.begin(batches, hidden)
        try:
            self._residency.begin(batches[0].start, batches[-1].kv_length)
            for number, piece in enumerate(self._pieces):
                self._run(number, piece, len(batches), cancel)
        except BaseException:
            self._residency.restart()
            if self._experts is not None:
                self._experts.restart()
            raise
        self._residency.read_ahead()
        if self.observer is not None:
            self.observer(batches)
        seconds = perf_counter() - start
        self._telemetry.passes += 1
        self._telemetry.tokens += tokens
        self._telemetry.pass_s += seconds
        if tokens == 1 and self._experts is not None:
            self._experts.passed(seconds)
        if self._sharing is not None:
            self._sharing.passed(tokens, seconds)

    def _run(self, number: int, piece: Piece, num_batches: int, cancel: CancelToken | None) -> None:
        asked = perf_counter()
        if cancel is not None:
            cancel.raise_if_cancelled()
        self._residency.acquire(piece.pinned, piece.streamed, cancel)
        arrived = perf_counter()
        telemetry = self._telemetry
        if piece.streamed:
            telemetry.waited(piece.name, asked, arrived)
        if piece.mixes is not None:
            assert self._experts is not None, piece
            self._experts.compute(piece.mixes, cancel)
        for batch in range(num_batches):
            kernels_s = self._backend.run(number, batch)
            telemetry.compute_s += kernels_s
            now = perf_counter()
            telemetry.span("compute", piece.name, now - kernels_s, now)
        self._residency.release(piece.streamed)
        if piece.routes is not None:
            assert self._experts is not None, piece
            choices = [self._backend.routed(batch, piece.routes) for batch in range(num_batches)]
            self._experts.demand(piece.routes, choices)
