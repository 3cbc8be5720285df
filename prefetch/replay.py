"""Runs a policy against a trace on a virtual clock, in seconds: what would hit, what would be read, how long it would take.

    token    layer 0          layer 1          ..
             |compute |read.. |compute |read..
                       ^ misses          the link is idle while layers compute, and that is when experts are fetched ahead

The optimum is Belady's: evict what is needed last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Final

import numpy as np
import numpy.typing as npt

from offload.blocks import ExpertKey
from offload.prefetch.eviction import Eviction
from offload.prefetch.policies import MakeEviction
from offload.prefetch.prediction import Perfect, Predictor
from offload.prefetch.routing import RoutingTrace

NEVER: Final = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Of the machine that is imagined: seconds to read an expert by itself, and to compute what a layer needs."""

    read_s: float
    layer_s: float


@dataclass(slots=True)
class Outcome:
    """What a replay counted.

    Attributes:
        demands, hits: experts that tokens chose, and those of them that the cache held when they did.
        fetched, useful: experts that were read ahead, and those of them that were used before they went.
        nbytes: read, for demands and ahead. seconds: of the virtual clock.
    """

    tokens: int = 0
    demands: int = 0
    hits: int = 0
    fetched: int = 0
    useful: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.demands if self.demands else 1.0

    @property
    def precision(self) -> float:
        """Share of what was fetched ahead that was then used."""
        return self.useful / self.fetched if self.fetched else 0.0


class Belady(Eviction):
    """The optimum: evicts what is needed last. Only a replay can have it, for it knows the trace."""

    def __init__(self, trace: RoutingTrace, rows: Sequence[int]) -> None:
        self._rows = {trace.layers[row]: row for row in rows}
        self._layers = {row: layer for layer, row in self._rows.items()}
        self._next = next_uses(trace)
        self._count = len(trace.layers)
        self._token = -1
        self._held: dict[ExpertKey, int] = {}

    def chosen(self, layer: int, experts: Sequence[int]) -> None:
        row = self._rows[layer]
        if row == min(self._layers):
            self._token += 1
        for expert in experts:
            key = ExpertKey(layer, int(expert))
            if key in self._held:
                self._held[key] = self._when(key)

    def add(self, key: ExpertKey, *, passing: bool = False) -> None:
        del passing
        self._held[key] = self._when(key)

    def remove(self, key: ExpertKey) -> None:
        del self._held[key]

    def victims(self, layer: int, count: int, keep: Iterable[ExpertKey]) -> list[ExpertKey]:
        del layer
        kept = set(keep)
        return nlargest(count, (key for key in self._held if key not in kept), key=self._held.__getitem__)

    def _when(self, key: ExpertKey) -> int:
        """The step of the next use, after the token at hand."""
        row = self._rows[key.layer]
        token = int(self._next[max(self._token, 0), row, key.expert])
        return NEVER if token >= len(self._next) else token * self._count + row


def whole(trace: RoutingTrace) -> RoutingTrace:
    """The trace without tokens that did not reach all layers."""
    kept = (trace.choices >= 0).all(axis=(1, 2))
    if kept.all():
        return trace
    parts = {name: part[kept] for name in ("choices", "passes", "foreseen") if len(part := getattr(trace, name))}
    return replace(trace, **parts)


def next_uses(trace: RoutingTrace) -> npt.NDArray[np.int32]:
    """At [t, row, expert]: the next token after `t` that chooses the expert, or the number of tokens."""
    tokens = trace.num_tokens
    result = np.full((tokens, len(trace.layers), trace.num_experts), tokens, dtype=np.int32)
    for token in range(tokens - 2, -1, -1):
        result[token] = result[token + 1]
        for row, chosen in enumerate(trace.choices[token + 1]):
            result[token, row, chosen[chosen >= 0]] = token + 1
    return result


class _Bank:
    """What a bank of slots holds, and who decides what goes. The plain model of `expert_cache`."""

    def __init__(self, slots: int, policy: Eviction) -> None:
        self.slots = slots
        self.policy = policy
        self.held: set[ExpertKey] = set()
        self.ahead: set[ExpertKey] = set()  # fetched, not used yet

    def admit(self, keys: Sequence[ExpertKey], layer: int, keep: Sequence[ExpertKey], *, passing: bool) -> int:
        """Takes in as many as there is room for; returns how many."""
        room = self.slots - len(self.held)
        if room < len(keys):
            for victim in self.policy.victims(layer, len(keys) - room, keep):
                self.policy.remove(victim)
                self.held.discard(victim)
                self.ahead.discard(victim)
        taken = keys[: self.slots - len(self.held)]
        for key in taken:
            self.held.add(key)
            self.policy.add(key, passing=passing)
        return len(taken)


def replay(
    trace: RoutingTrace,
    slots: dict[int, int],
    make: MakeEviction | None,
    *,
    speeds: Speeds = Speeds(read_s=1.0, layer_s=0.0),
    predictor: Predictor | None = None,
    width: int = 0,
    warm_up: int = 0,
) -> Outcome:
    """Replays every token of a trace that reached all layers, as if each had been decoded by itself.

    Args:
        slots: by bank. make: makes the policy of a bank; None is Belady's optimum.
        predictor: of what the next layer needs; None fetches nothing ahead.
        width: how many of the next layer's experts are fetched ahead at most, if the link has the time.
        warm_up: tokens that fill the cache and do not count.
    """
    trace = whole(trace)
    banks: dict[int, _Bank] = {}
    for bank, rows in trace.rows_of_bank.items():
        layers = [trace.layers[row] for row in rows]
        policy = Belady(trace, rows) if make is None else make(layers, trace.num_experts)
        banks[bank] = _Bank(slots[bank], policy)
    state = _Replay(trace, banks, speeds, predictor, width)
    for token in range(trace.num_tokens):
        if token == warm_up:
            state.outcome = Outcome()
        state.run(token)
    return state.outcome


class _Replay:
    """One replay's state while it runs."""

    def __init__(
        self, trace: RoutingTrace, banks: dict[int, _Bank], speeds: Speeds, predictor: Predictor | None, width: int
    ) -> None:
        self._trace = trace
        self._banks = banks
        self._speeds = speeds
        self._predictor = predictor
        self._width = width
        self._wanted: list[ExpertKey] = []
        self.outcome = Outcome()

    def run(self, token: int) -> None:
        if isinstance(self._predictor, Perfect):
            self._predictor.know(self._trace.choices[token])
        for row, layer in enumerate(self._trace.layers):
            self._layer(token, row, layer, self._trace.choices[token, row].tolist())
        self.outcome.tokens += 1

    def _layer(self, token: int, row: int, layer: int, chosen: list[int]) -> None:
        trace, outcome, bank = self._trace, self.outcome, self._banks[self._trace.banks[row]]
        self._fetch_ahead(row)
        needed = [ExpertKey(layer, expert) for expert in chosen]
        bank.policy.chosen(layer, chosen)
        misses = [key for key in needed if key not in bank.held]
        outcome.demands += len(needed)
        outcome.hits += len(needed) - len(misses)
        used = bank.ahead.intersection(needed)
        outcome.useful += len(used)
        bank.ahead -= used
        bank.admit(misses, layer, needed, passing=False)
        outcome.nbytes += len(misses) * trace.expert_bytes[row]
        outcome.seconds += self._speeds.layer_s + len(misses) * self._speeds.read_s
        if self._predictor is not None:
            self._predictor.chosen(row, chosen)
            self._predict(token, row)

    def _predict(self, token: int, row: int) -> None:
        self._wanted = []
        if self._width and row + 1 < len(self._trace.layers):
            assert self._predictor is not None
            foreseen = self._trace.foreseen[token, 0, row + 1] if self._trace.lookahead else ()
            scores = self._predictor.predict(row, 1, foreseen)
            best = np.argsort(-scores, kind="stable")[: self._width]
            layer = self._trace.layers[row + 1]
            self._wanted = [ExpertKey(layer, int(expert)) for expert in best if scores[expert] > 0]

    def _fetch_ahead(self, row: int) -> None:
        """What the link has time for while the layer computes what comes before its router."""
        bank = self._banks[self._trace.banks[row]]
        missing = [key for key in self._wanted if key not in bank.held]
        if self._speeds.layer_s:
            missing = missing[: int(self._speeds.layer_s / self._speeds.read_s)]
        if not missing:
            return
        taken = bank.admit(missing, self._trace.layers[row], self._wanted, passing=True)
        bank.ahead.update(missing[:taken])
        self.outcome.fetched += taken
        self.outcome.nbytes += taken * self._trace.expert_bytes[row]


def recall(trace: RoutingTrace, predictor: Predictor, ahead: int, width: int, warm_up: int = 0) -> tuple[float, float]:
    """Recall and precision of the `width` experts that a predictor names for the layer `ahead` of each."""
    trace, right, wanted, named = whole(trace), 0, 0, 0
    for token in range(trace.num_tokens):
        if isinstance(predictor, Perfect):
            predictor.know(trace.choices[token])
        for row in range(len(trace.layers)):
            predictor.chosen(row, trace.choices[token, row].tolist())
            if row + ahead >= len(trace.layers):
                continue
            foreseen = trace.foreseen[token, ahead - 1, row + ahead] if trace.lookahead >= ahead else ()
            scores = predictor.predict(row, ahead, foreseen)
            best = np.argsort(-scores, kind="stable")[:width]
            if token >= warm_up:
                right += len(set(best.tolist()).intersection(trace.choices[token, row + ahead].tolist()))
                wanted += trace.num_used
                named += len(best)
    return right / max(1, wanted), right / max(1, named)
