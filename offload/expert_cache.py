"""Brings experts from disk as tokens choose them, and those that a token is likely to choose next.

    demand     the choice of a layer is known: reads of all that is missing are started, in one submission; behind them, when
               the link is idle, reads of what the next layer's router would choose now
    compute    what is there is computed at once, the rest as it arrives; a slot is free again when its expert was computed

A choice of more experts than there are slots, as a prompt makes it, passes through in waves: each expert is read once. What
is computed does not depend on what was there, only how long it takes. Driver thread only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from time import perf_counter
from typing import Final, NamedTuple

import numpy as np

from offload.blocks import ExpertKey
from offload.expert_slots import ExpertBank, Flight, Form
from offload.kernels.batch import Backend, Ints
from offload.prefetch.governor import Governor
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken, Reader

PASSING_FLIGHTS: Final = 8
"""Experts of a prompt on their way at once: so many slots they pass through, and all others keep what tokens will need."""


class _Layer(NamedTuple):
    """A layer's choice while its experts are brought.

    Attributes:
        needed: which batches need an expert, by key. keep: all that must not go meanwhile.
        forms: what is read of an expert, where it is not all of it.
    """

    needed: dict[ExpertKey, list[int]]
    keep: set[ExpertKey]
    forms: dict[ExpertKey, Form]
    flights: deque[Flight]
    waiting: deque[ExpertKey]
    passing: bool


class ExpertCache:
    """See the module.

    Args:
        banks: by layer, in order. governor: says when reading ahead pays.
        skip_below: experts with a smaller share of a token's router weights are left out; 0 leaves out none.
        coarse_below: those that have to be read are read with half of their bits, where the banks have a pack.
    """

    def __init__(
        self,
        banks: Mapping[int, ExpertBank],
        backend: Backend,
        reader: Reader,
        telemetry: Telemetry,
        governor: Governor | None = None,
        skip_below: float = 0.0,
        coarse_below: float = 0.0,
    ) -> None:
        self._banks = banks
        self._backend = backend
        self._reader = reader
        self._telemetry = telemetry
        self._governor = governor or Governor(fixed=False)
        self._skip_below = skip_below
        self._coarse_below = coarse_below
        layers = list(banks)
        self._next_layer = dict(pairwise(layers))
        self._current: _Layer | None = None
        self._ahead: dict[ExpertKey, Flight] = {}

    def demand(self, layer: int, choices: Sequence[Ints]) -> None:
        """The micro-batches' tokens have chosen: starts reading what is missing, and then what may be needed next.

        Raises:
            StorageError: a file has shrunk.
        """
        if self._skip_below:
            for batch in range(len(choices)):
                self._telemetry.experts_skipped += self._backend.skip(batch, layer, self._skip_below)
            choices = [self._backend.routed(batch, layer) for batch in range(len(choices))]
        bank, needed = self._banks[layer], _union(layer, choices)
        passing = sum(len(choice) for choice in choices) != 1
        self._land_ahead()
        guesses = [] if passing or not self._governor.allows else self._guesses(layer)
        claimed = sum([bank.claim(key) for key in needed])
        flights = self._promote(needed)
        absent = sorted(key for key in needed if bank.slot(key) is None and key not in flights)
        light = self._light(layer, choices) if self._coarse_below and not passing else frozenset()
        forms: dict[ExpertKey, Form] = {key: "coarse" for key in absent if key.expert in light}
        forms |= {key: "rest" for key in needed if bank.is_coarse(key) and key.expert not in light}
        missing = deque(key for key in needed if forms.get(key) == "rest")
        missing.extend(absent)
        if not passing and needed:
            bank.chosen(layer, [key.expert for key in needed])
        self._telemetry.experts_demanded += len(needed)
        self._telemetry.experts_hit += len(needed) - len(absent) - len(flights) - claimed
        self._telemetry.guesses_used += claimed + len(flights)
        self._current = _Layer(needed, {*needed, *guesses}, forms, deque(flights.values()), missing, passing)
        self._start(bank, layer)
        if guesses:
            self._start_ahead(layer, guesses)

    def compute(self, layer: int, cancel: CancelToken | None) -> None:
        """Has all experts of the layer computed that were demanded last.

        Raises:
            StorageError, Cancelled, BackendError: not all were; `restart` before going on.
        """
        current, bank = self._current, self._banks[layer]
        assert current is not None
        ready = [key for key in current.needed if bank.slot(key) is not None and current.forms.get(key) != "rest"]
        while ready or current.flights or current.waiting:
            self._compute(layer, current, ready)
            for key in ready:
                del current.needed[key]  # its slot may be given away
                current.keep.discard(key)
            self._start(bank, layer)
            if not current.flights and current.waiting:
                self._read_anew(bank, layer)
            ready = self._land(bank, current, cancel)
        self._current = None

    def passed(self, seconds: float) -> None:
        """A pass of one token took so long."""
        self._governor.passed(seconds)

    def settle(self) -> None:
        """Nothing is on its way into a slot any more. Between passes."""
        assert self._current is None
        self.restart()

    def restart(self) -> None:
        """Forgets the choice at hand and what is on its way."""
        if self._current is None and not self._ahead:
            return
        self._reader.cancel_pending()
        self._reader.drain()
        if self._current is not None:
            for flight in self._current.flights:
                self._banks[flight.key.layer].drop(flight)
        self._current = None
        self._land_ahead()

    def fill(self, keys: Iterable[ExpertKey], progress: Callable[[int, int], None] | None = None) -> None:
        """Reads experts into free slots, as many as there are.

        Raises:
            StorageError: one could not be read.
        """
        flights: list[Flight] = []
        for key in keys:
            bank = self._banks[key.layer]
            if bank.has_free_slot and bank.slot(key) is None:
                flights += bank.start([key], key.layer, ())
        for number, flight in enumerate(flights):
            flight.handle.wait()
            self._banks[flight.key.layer].land(flight, passing=False)
            if progress is not None:
                progress(number + 1, len(flights))

    # ---- what is needed

    def _start(self, bank: ExpertBank, layer: int) -> None:
        current = self._current
        assert current is not None
        most = PASSING_FLIGHTS - len(current.flights) if current.passing else len(current.waiting)
        wanted = list(islice(current.waiting, max(0, most)))
        if not wanted:
            return
        started = bank.start(wanted, layer, current.keep, current.forms)
        current.flights.extend(started)
        for _ in started:
            current.waiting.popleft()

    def _read_anew(self, bank: ExpertBank, layer: int) -> None:
        """All slots hold coarse experts that are needed in full, and there is none for the rest of one: reads it whole."""
        current = self._current
        assert current is not None
        key = current.waiting[0]
        assert current.forms[key] == "rest", (key, current.forms[key])
        bank.forget(key)
        del current.forms[key]
        self._start(bank, layer)

    def _land(self, bank: ExpertBank, current: _Layer, cancel: CancelToken | None) -> list[ExpertKey]:
        """Waits for the first flight; returns what has arrived by then."""
        if not current.flights:
            return []
        landed = [flight for flight in current.flights if flight.handle.done()]
        if not landed:
            asked = perf_counter()
            current.flights[0].handle.wait(cancel)
            landed = [flight for flight in current.flights if flight.handle.done()]
            self._telemetry.waited(str(current.flights[0].key), asked, perf_counter())
        for flight in landed:
            flight.handle.wait()  # raises what went wrong
            current.flights.remove(flight)
            bank.land(flight, passing=current.passing)
        return [flight.key for flight in landed]

    def _compute(self, layer: int, current: _Layer, keys: Sequence[ExpertKey]) -> None:
        bank, telemetry = self._banks[layer], self._telemetry
        by_batch: dict[int, dict[int, int]] = {}
        for key in keys:
            slot = bank.slot(key)
            assert slot is not None
            telemetry.experts_coarse += bank.is_coarse(key)
            for batch in current.needed[key]:
                by_batch.setdefault(batch, {})[key.expert] = slot
        for batch, slots in by_batch.items():
            kernels_s = self._backend.compute_experts(batch, layer, slots)
            telemetry.compute_s += kernels_s
            now = perf_counter()
            telemetry.span("compute", f"blk.{layer}.experts", now - kernels_s, now)

    def _light(self, layer: int, choices: Sequence[Ints]) -> frozenset[int]:
        """The experts that the only token gives a small share of its weights."""
        batch = next(number for number, rows in enumerate(choices) if len(rows))
        weights, choice = self._backend.weights(batch, layer)[0], choices[batch][0]
        return frozenset(choice[weights < self._coarse_below * weights.sum()].tolist())

    # ---- what may be needed

    def _guesses(self, layer: int) -> list[ExpertKey]:
        """What the next layer's router would choose if its hidden state were this layer's, the likeliest first."""
        following = self._next_layer.get(layer)
        if following is None or not self._banks[following].reserve:
            return []
        foreseen = self._backend.foreseen(0, following, 1)
        return [ExpertKey(following, expert) for expert in foreseen[0].tolist()] if len(foreseen) else []

    def _start_ahead(self, layer: int, guesses: Sequence[ExpertKey]) -> None:
        assert self._current is not None
        bank = self._banks[guesses[0].layer]
        missing = [key for key in guesses if bank.slot(key) is None and key not in self._ahead]
        room = bank.reserve - sum(self._banks[key.layer] is bank for key in self._ahead)
        for flight in bank.start_ahead(missing[: max(0, room)], layer, self._current.keep):
            self._ahead[flight.key] = flight
            self._telemetry.guesses += 1

    def _promote(self, needed: Iterable[ExpertKey]) -> dict[ExpertKey, Flight]:
        """Turns guesses on their way into demands, where they were right, and drops what is left of the others.

        One that was dropped before, or has failed, and is needed after all, is read again.
        """
        sound = {key for key, flight in self._ahead.items() if flight.handle.error is None}
        right = {key: self._ahead.pop(key) for key in needed if key in sound}
        for flight in right.values():
            self._banks[flight.key.layer].release(flight)
        if right:
            self._reader.promote([flight.handle for flight in right.values()])
        if self._ahead:
            self._reader.drop([flight.handle for flight in self._ahead.values()])
            self._land_ahead()
        return right

    def _land_ahead(self) -> None:
        for key in [key for key, flight in self._ahead.items() if flight.handle.done()]:
            self._banks[key.layer].land_ahead(self._ahead.pop(key))


def _union(layer: int, choices: Sequence[Ints]) -> dict[ExpertKey, list[int]]:
    """The experts that were chosen, and in which batches."""
    needed: dict[ExpertKey, list[int]] = {}
    for batch, choice in enumerate(choices):
        chosen = choice[0].tolist() if len(choice) == 1 else np.unique(choice).tolist()
        for expert in chosen:
            if expert < 0:  # left out
                continue
            needed.setdefault(ExpertKey(layer, expert), []).append(batch)
    return needed
