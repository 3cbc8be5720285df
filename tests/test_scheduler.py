"""The order of a pass: blocks before kernels, every micro-batch, blocks back after; and what follows a pass that broke."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.blocks import BlockKey
from offload.errors import BackendError, Cancelled, StorageError
from offload.kernels.batch import MicroBatch, Piece
from offload.scheduler import Scheduler
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken

HIDDEN, WAIT_S, KERNEL_S = np.zeros((0, 4), np.float32), 3.0, 5.0
Call = tuple[Any, ...]


class Machine:
    """Backend, residency and clock in one: every call in the order it came, and one at which something else happens."""

    def __init__(self, streamed: Sequence[int]) -> None:
        """One piece with so many streamed blocks for each number."""
        keys = [tuple(BlockKey("weight", piece, "w", part) for part in range(n)) for piece, n in enumerate(streamed)]
        self.pieces = [Piece(f"p{number}", 10 + number, names) for number, names in enumerate(keys)]
        self.calls, self.now_s, self.cancel, self.telemetry = list[Call](), 0.0, CancelToken(), Telemetry(timeline=True)
        self.at: tuple[Call, Callable[[], object]] = (), lambda: None
        every = frozenset(key for names in keys for key in names)
        self.scheduler = Scheduler(self, self, every, self.telemetry)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self._called(name, *arguments)

    def _called(self, *call: object) -> None:
        self.calls.append(call)
        if call == self.at[0]:
            self.at[1]()

    def schedule(self, streamed: AbstractSet[BlockKey]) -> Sequence[Piece]:
        self._called("schedule", streamed)
        return self.pieces

    def run(self, piece: int, batch: int) -> float:
        self._called("run", piece, batch)
        self.now_s += KERNEL_S
        return KERNEL_S

    def acquire(self, *arguments: object) -> None:
        self._called("acquire", *arguments)
        self.now_s += WAIT_S

    def forward(self, sizes: Sequence[int]) -> list[Call]:
        """The calls of a pass over micro-batches of these sizes."""
        self.calls.clear()
        self.scheduler.forward([MicroBatch(0, size) for size in sizes], HIDDEN, self.cancel)
        return [call for call in self.calls if call[0] not in ("schedule", "begin")]

    def steps(self, num_batches: int) -> list[Call]:
        """The plain reference: what each piece is, in order."""
        calls: list[Call] = []
        for number, piece in enumerate(self.pieces):
            runs = [("run", number, batch) for batch in range(num_batches)]
            calls += [("acquire", piece.pinned, piece.streamed, self.cancel), *runs, ("release", piece.streamed)]
        return calls


PIECES = st.lists(st.integers(0, 3), min_size=1, max_size=6)
SIZES = st.lists(st.integers(1, 256), min_size=1, max_size=5)


@given(PIECES, SIZES, SIZES)
def test_a_pass_waits_computes_every_micro_batch_and_gives_back_piece_by_piece(
    pieces: list[int], first: list[int], second: list[int]
) -> None:
    machine = Machine(pieces)
    for sizes, begins in ((first, ["schedule", "begin"]), (second, ["begin"])):
        assert machine.forward(sizes) == [*machine.steps(len(sizes)), ("read_ahead",)]
        assert [call[0] for call in machine.calls[: len(begins)]] == begins
    assert (machine.telemetry.passes, machine.telemetry.tokens) == (2, sum(first) + sum(second))
    machine.scheduler.set_streamed(frozenset())
    machine.forward(first)
    assert machine.calls[0] == ("schedule", frozenset()), "other blocks to wait for cut the passes anew"


@given(PIECES, SIZES, st.data())
def test_after_an_error_or_a_cancel_the_cycle_begins_anew_and_the_next_pass_is_whole(
    pieces: list[int], sizes: list[int], data: st.DataObject
) -> None:
    machine = Machine(pieces)
    order = machine.steps(len(sizes))
    call = data.draw(st.sampled_from(order))
    error = data.draw(st.sampled_from([StorageError("x"), Cancelled("x"), BackendError("x"), KeyboardInterrupt()]))

    def fail() -> None:
        raise error

    machine.at = call, fail
    with pytest.raises(type(error)):
        machine.forward(sizes)
    assert machine.calls[2] == ("begin", 0, sizes[-1]), "what streams the cache is told of the positions"
    assert machine.calls[3:] == [*order[: order.index(call) + 1], ("restart",)]
    piece = data.draw(st.integers(0, len(pieces) - 1))
    machine.at = ("run", piece, 0), machine.cancel.cancel
    if piece < len(pieces) - 1:
        with pytest.raises(Cancelled):
            machine.forward(sizes)
        done = order[: order.index(("run", piece, len(sizes) - 1)) + 2]
        assert machine.calls[2:] == [*done, ("restart",)], "a cancel ends the pass before the next piece"
    assert (machine.telemetry.passes, machine.telemetry.tokens) == (0, 0)
    machine.at, machine.cancel = ((), lambda: None), CancelToken()
    assert machine.forward(sizes) == [*machine.steps(len(sizes)), ("read_ahead",)]


def test_waits_are_those_for_streamed_blocks_and_kernels_what_the_backend_says(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([0, 2, 0, 1])
    telemetry = machine.telemetry
    monkeypatch.setattr("offload.scheduler.perf_counter", lambda: machine.now_s)
    machine.forward([4, 4, 1])
    assert (telemetry.wait_s, telemetry.compute_s) == (2 * WAIT_S, 12 * KERNEL_S)
    assert telemetry.pass_s == machine.now_s and telemetry.other_s == 2 * WAIT_S  # pieces that wait for nothing
    compute = [[("compute", f"p{piece}", KERNEL_S)] * 3 for piece in range(4)]
    spans = [(event.lane, event.name, event.end_s - event.start_s) for event in telemetry.timeline or ()]
    waits = [("wait", "p1", WAIT_S), ("wait", "p3", WAIT_S)]
    assert spans == [*compute[0], waits[0], *compute[1], *compute[2], waits[1], *compute[3]]
