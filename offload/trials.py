"""Finds what makes a model with experts fastest, by decoding for real: what a replay or a guess promises must show.

A change is kept only if it is at least 3% faster in both of two comparisons, the second in the reverse order, and gives the
same tokens. Placement decides speed and nothing else; other tokens are a defect, and end the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Final

from offload.config import EXPERT_READ_WORKERS
from offload.errors import BackendError
from offload.prefetch.routing import RoutingTrace
from offload.tuning import Tuning, tune_by_replay

LEAST_GAIN: Final = 1.03
WORKERS: Final = (EXPERT_READ_WORKERS // 2, EXPERT_READ_WORKERS * 2)


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: its tokens, and how many came per second."""

    tokens: tuple[int, ...]
    tokens_per_second: float


Measure = Callable[[Tuning], Sample]


@dataclass(frozen=True, slots=True)
class Attempt:
    """A change that was tried: what it is, how many times as fast in each comparison, and whether it was kept."""

    name: str
    gains: tuple[float, ...]
    kept: bool


def candidates(best: Tuning, replayed: Tuning) -> Iterator[tuple[str, Tuning]]:
    """Changes to try, one at a time; `best` is what was kept of those before."""
    if replayed.policy != best.policy:
        yield f"policy {replayed.policy}", replace(best, policy=replayed.policy)
    for prefetch in ("on", "off"):
        yield f"prefetch {prefetch}", replace(best, prefetch=prefetch)
    for workers in WORKERS:
        yield f"{workers} requests in flight", replace(best, workers=workers)


def search(
    trace: RoutingTrace,
    share: float,
    measure: Measure,
    begin: Callable[[str], None] = lambda _: None,
    end: Callable[[Attempt], None] = lambda _: None,
) -> tuple[Tuning, list[Attempt]]:
    """Tries the candidates one after the other.

    Args:
        trace: of the model. share: of the experts that memory holds. measure: decodes with a tuning.
        begin: told what is tried next. end: told what came of it.

    Raises:
        BackendError: a run gave other tokens.
    """
    replayed = tune_by_replay(trace, share)
    best = replace(replayed, policy=Tuning().policy, by="trial")
    attempts: list[Attempt] = []
    tried: set[str] = set()
    while True:
        following = next(((name, tuning) for name, tuning in candidates(best, replayed) if name not in tried), None)
        if following is None:
            return best, attempts
        name, tuning = following
        tried.add(name)
        begin(name)
        gains = compare(best, tuning, measure)
        kept = min(gains) >= LEAST_GAIN
        attempts.append(Attempt(name, gains, kept))
        end(attempts[-1])
        if kept:
            best = tuning


def compare(ours: Tuning, theirs: Tuning, measure: Measure) -> tuple[float, ...]:
    """How many times as fast as ours theirs is: measured after ours, and, if it seems worth it, before ours too."""
    gains: list[float] = []
    for order in ((ours, theirs, theirs, ours), (theirs, ours, ours, theirs)):
        samples = [(tuning, measure(tuning)) for tuning in order]
        _check_tokens([sample for _, sample in samples])
        speeds = [
            mean(sample.tokens_per_second for tuning, sample in samples if tuning is one) for one in (ours, theirs)
        ]
        gains.append(speeds[1] / speeds[0])
        if gains[0] < LEAST_GAIN:
            break
    return tuple(gains)


def _check_tokens(samples: Sequence[Sample]) -> None:
    if any(sample.tokens != samples[0].tokens for sample in samples):
        raise BackendError("two runs of the same prompt gave different tokens; nothing was changed; please report this")
