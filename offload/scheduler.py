"""One forward pass: for each segment wait for its blocks, compute every micro-batch, let the blocks go.

Several micro-batches pass through a segment before the next one is fetched, so a pass reads each streamed block once,
however many tokens it carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

from offload.blocks import BlockKey
from offload.kernels.batch import Backend, Floats, MicroBatch, Segment
from offload.models.base import Model
from offload.residency import Residency
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken


class _Step(NamedTuple):
    segment: Segment
    name: str
    pinned: int
    streamed: tuple[BlockKey, ...]


def matrix_key(model: Model, name: str) -> BlockKey:
    """The block that holds matrix `name`."""
    for stage in model.stages:
        if name in stage.matrices:
            return BlockKey("weight", stage.layer, name)
    raise KeyError(name)


def make_steps(model: Model, streamed: frozenset[BlockKey]) -> list[_Step]:
    """Cuts the model where blocks may have to arrive: a stage with streamed blocks stands alone, others are merged."""
    steps: list[_Step] = []
    first = 0
    for index, stage in enumerate(model.stages):
        missing = tuple(key for name in stage.matrices if (key := BlockKey("weight", stage.layer, name)) in streamed)
        if missing or index + 1 == len(model.stages):
            if missing and first < index:
                steps.append(_step(model, len(steps), first, index, ()))
                first = index
            steps.append(_step(model, len(steps), first, index + 1, missing))
            first = index + 1
    return steps


def _step(model: Model, number: int, first: int, last: int, streamed: tuple[BlockKey, ...]) -> _Step:
    stages = model.stages[first:last]
    name = stages[0].name if len(stages) == 1 else f"{stages[0].name} .. {stages[-1].name}"
    pinned = sum(len(stage.matrices) for stage in stages) - len(streamed)
    return _Step(Segment(number, first, last), name, pinned, streamed)


class Scheduler:
    """Runs passes of one model on one backend. Called from the driver thread only."""

    def __init__(
        self, model: Model, backend: Backend, residency: Residency, streamed: frozenset[BlockKey], telemetry: Telemetry
    ) -> None:
        self._model = model
        self._backend = backend
        self._residency = residency
        self._telemetry = telemetry
        self._steps = make_steps(model, streamed)

    def set_streamed(self, streamed: frozenset[BlockKey]) -> None:
        """From the next pass on these blocks have to be waited for, and no others."""
        self._steps = make_steps(self._model, streamed)

    @property
    def segments(self) -> list[Segment]:
        return [step.segment for step in self._steps]

    def forward(self, batches: Sequence[MicroBatch], hidden: Floats, cancel: CancelToken | None = None) -> None:
        """Computes `batches`, whose embedded tokens are `hidden`; logits are then at the backend.

        Raises:
            Cancelled, StorageError, BackendError: the pass did not end; the next one starts from the first block.
        """
        start = perf_counter()
        self._backend.begin(batches, hidden)
        try:
            for step in self._steps:
                self._run(step, len(batches), cancel)
        except BaseException:
            self._residency.restart()
            raise
        self._residency.read_ahead()
        self._telemetry.passes += 1
        self._telemetry.tokens += sum(batch.num_tokens for batch in batches)
        self._telemetry.pass_s += perf_counter() - start

    def _run(self, step: _Step, num_batches: int, cancel: CancelToken | None) -> None:
        asked = perf_counter()
        if cancel is not None:
            cancel.raise_if_cancelled()
        self._residency.acquire(step.pinned, step.streamed, cancel)
        arrived = perf_counter()
        telemetry = self._telemetry
        if step.streamed:
            telemetry.waited(step.name, asked, arrived)
        for batch in range(num_batches):
            kernels_s = self._backend.run(step.segment, batch)
            telemetry.compute_s += kernels_s
            now = perf_counter()
            telemetry.span("compute", step.name, now - kernels_s, now)
        self._residency.release(step.streamed)
