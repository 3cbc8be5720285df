"""Which of two processors computes what, when weights lie beside one of them. Pure arithmetic.

Weights in host memory can cross the link and be computed on the device, or be computed by the host where they lie. Both at
once are done sooner than either alone: the split at which both end together (HeteGen, arXiv 2403.01164).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from offload.demand import BATCH_SPEEDUP

ROW_GROUP: Final = 32  # rows are divided in groups of so many, which fill the threads of both processors
LEAST_SHARE: Final = 0.05  # of rows: fewer are not worth the host's attention at every matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Processors:
    """What was measured, in bytes of weights per second: over the link to the device, and by the host for one token."""

    link_bps: float
    host_bps: float

    def costs(self, nbytes: int, tokens: int) -> tuple[float, float]:
        """Seconds that a matrix of so many bytes takes for so many tokens: on the device, and by the host.

        The device is taken to compute while the next one crosses; the host's kernels reuse what they read for a batch.
        """
        return nbytes / self.link_bps, nbytes / self.host_bps * max(1.0, tokens / BATCH_SPEEDUP)


def for_device(costs: Sequence[tuple[float, float]]) -> frozenset[int]:
    """Which of several pieces of work go to the device, the others being the host's, so that both are done soonest.

    What the device gains most on comes first to it; of such orders the best cut is taken, which is the optimum but for one
    piece.

    Args:
        costs: seconds on the device and on the host, of each.
    """
    order = sorted(range(len(costs)), key=lambda index: costs[index][0] / max(costs[index][1], 1e-12))
    device_s, host_s = 0.0, sum(host for _, host in costs)
    best, cut = host_s, 0
    for count, index in enumerate(order, 1):
        device_s += costs[index][0]
        host_s -= costs[index][1]
        if max(device_s, host_s) < best:
            best, cut = max(device_s, host_s), count
    return frozenset(order[:cut])


def share_of_host(link_bps: float, host_bps: float) -> float:
    """Of the rows of a matrix in host memory, what the host computes to end when the others have crossed the link."""
    share = host_bps / (host_bps + link_bps) if link_bps else 0.0
    return share if share >= LEAST_SHARE else 0.0


def rows_on_device(rows: int, host_share: float) -> int:
    """How many rows of a matrix the device computes when the host takes such a share of them; at least a group."""
    groups = round(rows * host_share / ROW_GROUP)
    return max(min(rows, ROW_GROUP), rows - groups * ROW_GROUP)
