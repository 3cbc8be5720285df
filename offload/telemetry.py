"""Counters of the hot loop, and an optional timeline. Holds numbers only; formatting is the cli's, files are `trace`'s.

Threads: the driver thread writes everything but `timeline`, to which I/O workers append too (a deque append is atomic).
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from offload.results import ExpertUse

TIMELINE_EVENTS: Final = 1_000_000  # about 100 MB of events at the very most; the oldest go first


class Event(NamedTuple):
    """A span of the timeline, in `time.perf_counter` seconds. `lane` is a row of the picture: compute, wait, read."""

    lane: str
    name: str
    start_s: float
    end_s: float
    nbytes: int = 0


class Telemetry:
    """Totals since the engine was loaded.

    Attributes:
        demands, hits: of blocks, and those that were found in memory.
        experts_demanded, experts_hit: of experts, and those that memory held from earlier tokens.
        experts_coarse: computed from a coarse copy. experts_skipped: chosen, and left out for their small weight.
        guesses, guesses_used: experts that were read ahead, and those that were then needed.
    """

    __slots__ = (
        "compute_s", "demands", "experts_coarse", "experts_demanded", "experts_hit", "experts_skipped", "guesses",
        "guesses_used", "hits", "pass_s", "passes", "timeline", "tokens", "wait_s",
    )  # fmt: skip

    def __init__(self, *, timeline: bool = False) -> None:
        self.compute_s = 0.0
        self.wait_s = 0.0
        self.pass_s = 0.0
        self.passes = 0
        self.tokens = 0
        self.demands = 0
        self.hits = 0
        self.experts_demanded = 0
        self.experts_hit = 0
        self.experts_skipped = 0
        self.experts_coarse = 0
        self.guesses = 0
        self.guesses_used = 0
        self.timeline: deque[Event] | None = deque(maxlen=TIMELINE_EVENTS) if timeline else None

    def span(self, lane: str, name: str, start_s: float, end_s: float, nbytes: int = 0) -> None:
        """Adds to the timeline, if one is kept."""
        if self.timeline is not None:
            self.timeline.append(Event(lane, name, start_s, end_s, nbytes))

    def waited(self, name: str, start_s: float, end_s: float) -> None:
        """Nothing was computed because bytes were on their way."""
        self.wait_s += end_s - start_s
        self.span("wait", name, start_s, end_s)

    @property
    def other_s(self) -> float:
        """Time of passes that was neither kernels nor waits: Python."""
        return max(0.0, self.pass_s - self.compute_s - self.wait_s)

    @property
    def experts(self) -> ExpertUse:
        """The same as a record."""
        return ExpertUse(
            demanded=self.experts_demanded,
            hits=self.experts_hit,
            fetched_ahead=self.guesses,
            used_ahead=self.guesses_used,
            skipped=self.experts_skipped,
            coarse=self.experts_coarse,
        )

    @property
    def hit_rate(self) -> float:
        """Share of demands, of blocks and of experts, that found it in memory."""
        demands = self.demands + self.experts_demanded
        return (self.hits + self.experts_hit) / demands if demands else 1.0
