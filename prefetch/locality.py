"""Whether a model suits experts on disk at all: how well a few fixed experts serve a run of tokens.

Both figures are of Liang et al., *Not all models suit expert offloading*, arXiv 2505.16056, computed from a trace.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from offload.prefetch.routing import RoutingTrace

SEGMENT_TOKENS: Final = 16
CACHE_FACTOR: Final = 2.0


def segment_routing_performance(trace: RoutingTrace, segment: int = SEGMENT_TOKENS) -> float:
    """SRP: the best F1 that one set of experts can reach for all tokens of a segment, in the mean of segments and layers.

    1 if a segment's tokens choose alike.
    """
    counts, used = _counts(trace, segment), trace.num_used
    covered = np.cumsum(counts, axis=-1)
    sizes = np.arange(1, trace.num_experts + 1)
    return float((2 * covered / (segment * (sizes + used))).max(axis=-1).mean())


def segment_cache_hit_rate(
    trace: RoutingTrace, segment: int = SEGMENT_TOKENS, cache_factor: float = CACHE_FACTOR
) -> float:
    """SCH: the hit rate of a layer's cache that is filled with the best experts for each segment to come.

    Args:
        cache_factor: experts that the cache holds, beside those that a token uses.
    """
    counts, used = _counts(trace, segment), trace.num_used
    held = max(1, min(trace.num_experts, round(cache_factor * used)))
    return float(counts[..., :held].sum(axis=-1).mean() / (segment * used))


def _counts(trace: RoutingTrace, segment: int) -> npt.NDArray[np.int64]:
    """How often each expert was chosen, most often first: [segments, layers, num_experts]."""
    whole = trace.choices[(trace.choices >= 0).all(axis=(1, 2))]
    number = len(whole) // segment
    if number == 0:
        raise ValueError(f"{len(whole)} tokens are no segment of {segment}")
    parts = whole[: number * segment].reshape(number, segment, len(trace.layers), trace.num_used)
    chosen = np.zeros((number, len(trace.layers), trace.num_experts), dtype=np.int64)
    for place, row in np.ndindex(chosen.shape[:2]):
        chosen[place, row] = np.bincount(parts[place, :, row].reshape(-1), minlength=trace.num_experts)
    ordered: npt.NDArray[np.int64] = -np.sort(-chosen, axis=-1)
    return ordered
