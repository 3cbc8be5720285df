"""Writes down what routers decide while tokens are computed. What is recorded changes no token.

Recording asks the routers ahead at every layer too, for prompts as well, so that a replay can judge predictors; not where
routers are streamed, and so are not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt

from offload.expert_bank import expert_banks, expert_nbytes
from offload.host_place import routers_stay
from offload.kernels.batch import Backend, Foresight, MicroBatch
from offload.loader import Runner
from offload.models.base import Model
from offload.prefetch.routing import NOBODY, Ids, RoutingTrace

LOOKAHEAD: Final = 3
WIDTH_FACTOR: Final = 2  # experts that a guess names, beside those that a token uses


class Recorder:
    """Collects the choices of every pass while it is attached to a runner's scheduler."""

    def __init__(self, model: Model, backend: Backend, foresight: Foresight) -> None:
        self._backend = backend
        self._foresight = foresight
        self._layers = tuple(model.experts)
        self._used = max(layer.num_used for layer in model.experts.values())
        self._choices: list[Ids] = []
        self._foreseen: list[Ids] = []
        self._passes: list[int] = []

    def observe(self, batches: Sequence[MicroBatch]) -> None:
        """A pass over these has ended."""
        number = self._passes[-1] + 1 if self._passes else 0
        for place, batch in enumerate(batches):
            tokens = batch.num_tokens
            choices = np.full((tokens, len(self._layers), self._used), NOBODY, np.int16)
            foreseen = np.full(
                (tokens, self._foresight.lookahead, len(self._layers), self._foresight.width), NOBODY, np.int16
            )
            for row, layer in enumerate(self._layers):
                rows = batch.outputs if batch.outputs and row == len(self._layers) - 1 else range(tokens)
                routed = self._backend.routed(place, layer)
                if len(routed):
                    choices[list(rows), row] = routed
                for ahead in range(1, min(row, self._foresight.lookahead) + 1):
                    named = self._backend.foreseen(place, layer, ahead)
                    if len(named) == tokens:
                        foreseen[:, ahead - 1, row, : named.shape[1]] = named
            self._choices.append(choices)
            self._foreseen.append(foreseen)
            self._passes += [number] * tokens

    def arrays(self) -> tuple[Ids, Ids, npt.NDArray[np.int32]]:
        """Choices, guesses and numbers of passes of all tokens so far."""
        return np.concatenate(self._choices), np.concatenate(self._foreseen), np.array(self._passes, np.int32)


@contextmanager
def recording(runner: Runner) -> Iterator[Recorder]:
    """Records every pass of the block. Driver thread only."""
    model = runner.opened.model
    width = min(WIDTH_FACTOR * max(layer.num_used for layer in model.experts.values()), _num_experts(model))
    asks = routers_stay(model, runner.plan)
    foresight = Foresight(LOOKAHEAD, width, in_prompts=True) if asks else Foresight()
    recorder = Recorder(model, runner.backend, foresight)
    runner.foresee(foresight)
    runner.scheduler.observer = recorder.observe
    try:
        yield recorder
    finally:
        runner.scheduler.observer = None
        runner.foresee(None)


def finish(recorder: Recorder, runner: Runner, origin: str, *, by_themselves: bool) -> RoutingTrace:
    """The trace of what was recorded.

    Args:
        by_themselves: counts each token as a pass of its own, as if it had been decoded.
    """
    choices, foreseen, passes = recorder.arrays()
    model = runner.opened.model
    banks = expert_banks(model)
    bank_of = {layer.layer: number for number, bank in enumerate(banks) for layer in bank.layers}
    demand = runner.plan.demand
    return RoutingTrace(
        model=runner.opened.checkpoint.fingerprint,
        origin=origin,
        layers=tuple(model.experts),
        num_experts=_num_experts(model),
        expert_bytes=tuple(expert_nbytes(layer) for layer in model.experts.values()),
        banks=tuple(bank_of[layer] for layer in model.experts),
        slot_bytes=tuple(banks[bank_of[layer]].stride for layer in model.experts),
        fixed_bytes=sum(demand.fixed.values()) + sum(block.footprint for block in demand.blocks),
        choices=choices,
        passes=np.arange(len(passes), dtype=np.int32) if by_themselves else passes,
        foreseen=foreseen,
    )


def _num_experts(model: Model) -> int:
    return max(len(layer.experts) for layer in model.experts.values())
