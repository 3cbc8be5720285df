"""Experts in memory: a bank of slots for layers of one shape, filled from disk as tokens choose experts.

    demand     the choice of a layer is known: reads of all that is missing are started, in one submission
    compute    what is there is computed at once, the rest as it arrives; a slot is free again when its expert was computed

A choice of more experts than there are slots, as a prompt makes it, passes through in waves: each expert is read once. What
is computed does not depend on what was there, only how long it takes. Driver thread only.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from time import perf_counter
from typing import Final, NamedTuple

import numpy as np

from offload.blocks import Extent
from offload.expert_bank import BankSpec, ExpertKey
from offload.kernels.batch import Backend, ExpertPlace, Ints
from offload.prefetch.eviction import Eviction
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken, Handle, Reader
from offload.tiers.ram import Slab

PASSING_FLIGHTS: Final = 8
"""Experts of a prompt on their way at once: so many slots they pass through, and all others keep what tokens will need."""


class _Flight(NamedTuple):
    """An expert on its way into a slot."""

    key: ExpertKey
    slot: int
    handles: Sequence[Handle]

    def done(self) -> bool:
        return all(handle.done() for handle in self.handles)


class ExpertBank:
    """The slots of a bank, and what is in them.

    Args:
        slab: memory of `num_slots` slots.
    """

    def __init__(self, spec: BankSpec, slab: Slab, num_slots: int, reader: Reader, policy: Eviction[ExpertKey]) -> None:
        assert num_slots * spec.stride <= slab.nbytes, (num_slots, spec.stride, slab.nbytes)
        self.spec = spec
        self.num_slots = num_slots
        self._slab = slab
        self._reader = reader
        self._policy = policy
        self._layers = {layer.layer: layer for layer in spec.layers}
        self._offsets = {layer.layer: spec.offsets(layer) for layer in spec.layers}
        self._free = deque(range(num_slots))
        self._slots: dict[ExpertKey, int] = {}

    def place(self, layer: int) -> ExpertPlace:
        """What kernels need to know."""
        return ExpertPlace(
            self._slab.address, self.spec.stride, self.num_slots, self._offsets[layer], is_resident=False
        )

    def slot(self, key: ExpertKey) -> int | None:
        """Where an expert is, or None."""
        return self._slots.get(key)

    @property
    def has_free_slot(self) -> bool:
        """Whether an expert can come without another one going."""
        return bool(self._free)

    def use(self, key: ExpertKey) -> None:
        """A token needs an expert that is there."""
        self._policy.use(key)

    def start(self, keys: Iterable[ExpertKey], keep: Mapping[ExpertKey, object]) -> list[_Flight]:
        """Starts reading experts into slots, whose experts go, in one submission; fewer where slots hold what must stay."""
        taken: list[tuple[ExpertKey, int]] = []
        for key in keys:
            slot = self._take_slot(keep)
            if slot is None:
                break
            taken.append((key, slot))
        requests = [request for key, slot in taken for request in self._requests(key, slot)]
        try:
            handles = self._reader.read_extents(requests)
        except BaseException:
            self._free.extend(slot for _, slot in taken)
            raise
        each = len(self.spec.windows)
        return [_Flight(key, slot, handles[i * each : (i + 1) * each]) for i, (key, slot) in enumerate(taken)]

    def _take_slot(self, keep: Mapping[ExpertKey, object]) -> int | None:
        if not self._free:
            victim = self._policy.victim(keep)
            if victim is None:
                return None
            self._policy.remove(victim)
            self._free.append(self._slots.pop(victim))
        return self._free.popleft()

    def _requests(self, key: ExpertKey, slot: int) -> Iterator[tuple[Extent, memoryview]]:
        matrices, base = self._layers[key.layer].experts[key.expert], slot * self.spec.stride
        for matrix, start, window in zip(matrices, self.spec.starts, self.spec.windows, strict=True):
            yield matrix.extent, self._slab.view(base + start, window)

    def land(self, flight: _Flight, *, passing: bool) -> None:
        """A flight has ended well: its expert is in the bank."""
        self._settle(flight)
        self._slots[flight.key] = flight.slot
        self._policy.add(flight.key, passing=passing)

    def drop(self, flight: _Flight) -> None:
        """A flight has ended, and nobody wants to know how."""
        self._free.append(flight.slot)

    def _settle(self, flight: _Flight) -> None:
        """Moves the matrices of an expert to where kernels look for those of its layer, when they lie elsewhere."""
        base = self._slab.address + flight.slot * self.spec.stride
        matrices = self._layers[flight.key.layer].experts[flight.key.expert]
        for matrix, start, offset in zip(matrices, self.spec.starts, self._offsets[flight.key.layer], strict=True):
            found = start + matrix.extent.lead
            if found != offset:
                ctypes.memmove(base + offset, base + found, matrix.nbytes)


class _Layer(NamedTuple):
    """A layer's choice while its experts are brought: which batches need an expert, by key."""

    needed: dict[ExpertKey, list[int]]
    flights: deque[_Flight]
    waiting: deque[ExpertKey]
    passing: bool


class ExpertCache:
    """See the module.

    Args:
        banks: by layer.
    """

    def __init__(self, banks: Mapping[int, ExpertBank], backend: Backend, reader: Reader, telemetry: Telemetry) -> None:
        self._banks = banks
        self._backend = backend
        self._reader = reader
        self._telemetry = telemetry
        self._current: _Layer | None = None

    def demand(self, layer: int, choices: Sequence[Ints]) -> None:
        """The micro-batches' tokens have chosen: starts reading what is missing.

        Raises:
            StorageError: a file has shrunk.
        """
        bank, needed = self._banks[layer], _union(layer, choices)
        passing = sum(len(choice) for choice in choices) > 1
        hits = [key for key in needed if bank.slot(key) is not None]
        if not passing:
            for key in hits:
                bank.use(key)
        self._telemetry.demands += len(needed)
        self._telemetry.hits += len(hits)
        waiting = deque(sorted(key for key in needed if bank.slot(key) is None))
        self._current = _Layer(needed, deque(), waiting, passing)
        self._start(bank)

    def compute(self, layer: int, cancel: CancelToken | None) -> None:
        """Has all experts of the layer computed that were demanded last.

        Raises:
            StorageError, Cancelled, BackendError: not all were; `restart` before going on.
        """
        current, bank = self._current, self._banks[layer]
        assert current is not None
        ready = [key for key in current.needed if bank.slot(key) is not None]
        while ready or current.flights or current.waiting:
            self._compute(layer, current, ready)
            for key in ready:
                del current.needed[key]  # its slot may be given away
            self._start(bank)
            ready = self._land(bank, current, cancel)
        self._current = None

    def restart(self) -> None:
        """Forgets the choice at hand and what is on its way."""
        if self._current is None:
            return
        self._reader.cancel_pending()
        self._reader.drain()
        for flight in self._current.flights:
            self._banks[flight.key.layer].drop(flight)
        self._current = None

    def fill(self, keys: Iterable[ExpertKey], progress: Callable[[int, int], None] | None = None) -> None:
        """Reads experts into free slots, as many as there are.

        Raises:
            StorageError: one could not be read.
        """
        flights: list[_Flight] = []
        for key in keys:
            bank = self._banks[key.layer]
            if bank.has_free_slot:
                flights += bank.start([key], {})
        for number, flight in enumerate(flights):
            for handle in flight.handles:
                handle.wait()
            self._banks[flight.key.layer].land(flight, passing=False)
            if progress is not None:
                progress(number + 1, len(flights))

    def _start(self, bank: ExpertBank) -> None:
        current = self._current
        assert current is not None
        most = PASSING_FLIGHTS - len(current.flights) if current.passing else len(current.waiting)
        wanted = list(islice(current.waiting, max(0, most)))
        if not wanted:
            return
        started = bank.start(wanted, current.needed)
        current.flights.extend(started)
        for _ in started:
            current.waiting.popleft()

    def _land(self, bank: ExpertBank, current: _Layer, cancel: CancelToken | None) -> list[ExpertKey]:
        """Waits for the first flight; returns what has arrived by then."""
        if not current.flights:
            return []
        asked = perf_counter()
        for handle in current.flights[0].handles:
            handle.wait(cancel)
        self._telemetry.waited(str(current.flights[0].key), asked, perf_counter())
        landed = []
        while current.flights and current.flights[0].done():
            flight = current.flights.popleft()
            for handle in flight.handles:
                handle.wait()  # raises what went wrong
            bank.land(flight, passing=current.passing)
            landed.append(flight.key)
        return landed

    def _compute(self, layer: int, current: _Layer, keys: Sequence[ExpertKey]) -> None:
        bank, telemetry = self._banks[layer], self._telemetry
        by_batch: dict[int, dict[int, int]] = {}
        for key in keys:
            slot = bank.slot(key)
            assert slot is not None
            for batch in current.needed[key]:
                by_batch.setdefault(batch, {})[key.expert] = slot
        for batch, slots in by_batch.items():
            kernels_s = self._backend.compute_experts(batch, layer, slots)
            telemetry.compute_s += kernels_s
            now = perf_counter()
            telemetry.span("compute", f"blk.{layer}.experts", now - kernels_s, now)


def _union(layer: int, choices: Sequence[Ints]) -> dict[ExpertKey, list[int]]:
    """The experts that were chosen, and in which batches."""
    needed: dict[ExpertKey, list[int]] = {}
    for batch, choice in enumerate(choices):
        chosen = choice[0].tolist() if len(choice) == 1 else np.unique(choice).tolist()
        for expert in chosen:
            needed.setdefault(ExpertKey(layer, expert), []).append(batch)
    return needed
