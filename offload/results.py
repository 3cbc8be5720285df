"""What a caller gets back: chunks while a text grows, a completion at the end, statistics at any time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds and tokens per second of one request. `ttft_s` runs from the request to its first token."""

    load_s: float
    ttft_s: float
    prefill_tps: float
    decode_tps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeUse:
    """Traffic over one edge, such as `nvme->ram`. `busy_s` is the time with at least one transfer in flight."""

    bytes: int
    busy_s: float

    @property
    def bandwidth_bps(self) -> float:
        """Bytes per second while busy."""
        return self.bytes / self.busy_s if self.busy_s > 0 else 0.0

    def __add__(self, other: EdgeUse) -> EdgeUse:
        return EdgeUse(bytes=self.bytes + other.bytes, busy_s=self.busy_s + other.busy_s)

    def since(self, before: EdgeUse) -> EdgeUse:
        """What was added."""
        return EdgeUse(bytes=self.bytes - before.bytes, busy_s=self.busy_s - before.busy_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """Weights that live in a tier, and the share of block demands that found their block already there."""

    bytes: int
    hit_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUse:
    """Experts that tokens chose, by how they came.

    Attributes:
        demanded: chosen. hits: of these, in memory since an earlier token.
        fetched_ahead: read before they were known to be needed. used_ahead: of these, needed then.
        coarse: computed from a copy of half of the bits; see `LoadConfig.coarse_experts_below`.
        skipped: left out for their small router weight, and not counted as demanded; see `LoadConfig.skip_experts_below`.
    """

    demanded: int
    hits: int
    fetched_ahead: int
    used_ahead: int
    skipped: int = 0
    coarse: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the chosen that was in memory since an earlier token."""
        return self.hits / self.demanded if self.demanded else 1.0

    @property
    def misses(self) -> int:
        """Chosen experts that had to be read, ahead of need or on demand."""
        return self.demanded - self.hits

    def since(self, earlier: ExpertUse) -> ExpertUse:
        """What came to it after `earlier`."""
        return ExpertUse(
            demanded=self.demanded - earlier.demanded,
            hits=self.hits - earlier.hits,
            fetched_ahead=self.fetched_ahead - earlier.fetched_ahead,
            used_ahead=self.used_ahead - earlier.used_ahead,
            skipped=self.skipped - earlier.skipped,
            coarse=self.coarse - earlier.coarse,
        )


class Alternative(NamedTuple):
    """A token that could have been chosen, with its natural-log probability before sampling filters."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """The chosen token's log probability and the most probable alternatives, best first."""

    token: int
    logprob: float
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a growing answer. `text` is whole UTF-8; `tokens` may be ahead of it by an unfinished character."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished answer and how it was made. `tokens` are the generated ids, the end-of-text token excluded.

    `experts` is None where the model has none, or all of them are always in memory.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...]
    io: Mapping[str, EdgeUse]
    residency: Mapping[str, TierUse]
    peak_rss_bytes: int
    experts: ExpertUse | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Totals of an engine since it was loaded.

    Attributes:
        passes: forward passes, one per generated token and one per prefill chunk.
        compute_s: time inside kernels. wait_s: time waiting for blocks and token rows.
        other_s: the rest of all passes (Python).
        bound: what limited the passes: "disk" when waiting for reads exceeded computing, else "compute".
    """

    passes: int
    tokens: int
    compute_s: float
    wait_s: float
    other_s: float
    bound: Literal["disk", "link", "compute"]
    io: Mapping[str, EdgeUse]
    residency: Mapping[str, TierUse]
    kv_tokens: int
    rss_bytes: int
    peak_rss_bytes: int
    experts: ExpertUse | None = None
