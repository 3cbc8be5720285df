"""The line under a growing answer: tokens/s, disk, what is resident, what bounds the speed. Draws nothing itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from offload.cli.report import disk_use, resident_share
from offload.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from offload.engine import Engine
    from offload.results import Statistics


class StatusLine:
    """Counts one answer. Rates are over this answer alone, from its first token on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._start_s = time.monotonic()
        self._first_s: float | None = None
        self._tokens = 0
        before = disk_use(engine.statistics().io)
        self._before_bytes, self._before_s = (before.bytes, before.busy_s) if before else (0, 0.0)
        self._first: Statistics | None = None

    def count(self, tokens: int) -> None:
        """`tokens` more have arrived."""
        self._tokens += tokens
        if self._first_s is None:
            self._first_s = time.monotonic()
            self._first = self._engine.statistics()

    def prefill(self, done: int, total: int) -> str:
        """While the prompt is read."""
        share = done / total if total else 1.0
        return f"reading the prompt {share:.0%} · {format_duration(time.monotonic() - self._start_s)}"

    def decode(self) -> str:
        """While tokens come."""
        statistics = self._engine.statistics()
        parts = [self._speed()]
        disk = disk_use(statistics.io)
        if disk is not None and disk.busy_s > self._before_s:
            rate = (disk.bytes - self._before_bytes) / (disk.busy_s - self._before_s)
            parts.append(f"disk {format_rate(rate)}")
        parts += self._experts(statistics)
        parts.append(f"{resident_share(statistics.residency, self._engine.plan.model_bytes):.0%} resident")
        parts.append(f"bound by {statistics.bound}")
        return " · ".join(parts)

    def _experts(self, now: Statistics) -> list[str]:
        """What tokens since the first one found in memory, and what they had to have read."""
        before, tokens = self._first, self._tokens - 1
        if now.experts is None or before is None or before.experts is None or tokens < 1:
            return []
        use = now.experts.since(before.experts)
        nbytes = sum(edge.bytes for edge in now.io.values()) - sum(edge.bytes for edge in before.io.values())
        per_token = f"{use.misses / tokens:.0f} misses and {format_size(nbytes / tokens)} a token"
        return [f"experts {use.hit_rate:.0%} hit, {per_token}"]

    def _speed(self) -> str:
        if self._first_s is None or self._tokens < 2:
            return "first token"
        elapsed = max(time.monotonic() - self._first_s, 1e-6)
        return f"{(self._tokens - 1) / elapsed:.1f} tok/s"
