"""Routings that nobody learned: uniform, skewed and drifting. What a policy is worth on them is known beforehand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from offload.prefetch.routing import RoutingTrace

Weights = npt.NDArray[np.float64]


def uniform(tokens: int, layers: int, num_experts: int, num_used: int, seed: int = 0) -> RoutingTrace:
    """Every expert equally likely, every token for itself: no policy can beat another."""
    return _draw(np.zeros((tokens, layers, num_experts)), num_used, seed, "uniform")


def skewed(
    tokens: int, layers: int, num_experts: int, num_used: int, seed: int = 0, exponent: float = 1.0
) -> RoutingTrace:
    """Popularity falls with rank as in Zipf's law, the same for all tokens; each layer ranks its experts differently."""
    return _draw(np.tile(_zipf(layers, num_experts, exponent, seed), (tokens, 1, 1)), num_used, seed, "skewed")


def drifting(
    tokens: int, layers: int, num_experts: int, num_used: int, seed: int = 0, exponent: float = 1.0, period: int = 256
) -> RoutingTrace:
    """As `skewed`, but the ranks change: over every `period` tokens one ranking gives way to another."""
    anchors = np.stack([_zipf(layers, num_experts, exponent, seed + n) for n in range(tokens // period + 2)])
    at = np.arange(tokens) / period
    before, share = at.astype(np.int64), (at % 1)[:, None, None]
    return _draw((1 - share) * anchors[before] + share * anchors[before + 1], num_used, seed, "drifting")


def _zipf(layers: int, num_experts: int, exponent: float, seed: int) -> Weights:
    """Logarithms of weights, [layers, num_experts]."""
    random = np.random.default_rng(seed)
    ranks = np.argsort(random.random((layers, num_experts)), axis=-1) + 1
    weights: Weights = -exponent * np.log(ranks)
    return weights


def _draw(log_weights: Weights, num_used: int, seed: int, origin: str) -> RoutingTrace:
    """Draws without replacement: Gumbel noise on the logarithms, then the largest (Kool et al., arXiv 1903.06059)."""
    tokens, layers, num_experts = log_weights.shape
    noisy = log_weights + np.random.default_rng(seed + 1).gumbel(size=log_weights.shape)
    choices = np.argsort(-noisy, axis=-1)[..., :num_used].astype(np.int16)
    return RoutingTrace(
        origin=origin, layers=tuple(range(layers)), num_experts=num_experts, expert_bytes=(1,) * layers,
        banks=(0,) * layers, slot_bytes=(1,) * layers, choices=choices, passes=np.arange(tokens, dtype=np.int32),
    )  # fmt: skip
