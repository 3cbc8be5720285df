"""What an answer, or all answers of an engine, took: bytes over every edge, residency, times, memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

import psutil

from offload.generate import Answer
from offload.loader import Runner
from offload.results import Completion, EdgeUse, ExpertUse, Statistics, TierUse, Timings


class Usage(NamedTuple):
    """Counters since the engine was loaded."""

    io: Mapping[str, EdgeUse]
    experts: ExpertUse | None

    def since(self, before: Usage) -> Usage:
        """What was added."""
        io = {edge: use.since(before.io[edge]) for edge, use in self.io.items()}
        return Usage(io, None if self.experts is None or before.experts is None else self.experts.since(before.experts))


def usage(runner: Runner) -> Usage:
    """The counters now."""
    experts = runner.telemetry.experts if runner.fetches_experts else None
    return Usage({"nvme->ram": runner.disk_use, **runner.kv_traffic}, experts)


def report_totals(runner: Runner, *, kv_tokens: int) -> Statistics:
    """What everything took since the engine was loaded."""
    telemetry, used, rss = runner.telemetry, usage(runner), psutil.Process().memory_info().rss
    return Statistics(
        passes=telemetry.passes,
        tokens=telemetry.tokens,
        compute_s=telemetry.compute_s,
        wait_s=telemetry.wait_s,
        other_s=telemetry.other_s,
        bound="disk" if telemetry.wait_s > telemetry.compute_s else "compute",
        io=used.io,
        residency=_residency(runner),
        kv_tokens=kv_tokens,
        rss_bytes=rss,
        peak_rss_bytes=peak_rss(rss),
        experts=used.experts,
    )


def report_answer(runner: Runner, answer: Answer, before: Usage, *, load_s: float) -> Completion:
    """What an answer took.

    Args:
        before: the counters when it began. load_s: how long loading the model took.
    """
    first = answer.first_token_s or answer.ended_s
    prefill_s, decode_s = first - answer.started_s, answer.ended_s - first
    computed = answer.prompt_tokens - answer.cached_tokens
    used = usage(runner).since(before)
    return Completion(
        text=answer.text,
        tokens=tuple(answer.tokens),
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        timings=Timings(
            load_s=load_s,
            ttft_s=prefill_s,
            prefill_tps=computed / prefill_s if prefill_s > 0 else 0.0,
            decode_tps=(len(answer.tokens) - 1) / decode_s if decode_s > 0 and len(answer.tokens) > 1 else 0.0,
        ),
        logprobs=tuple(answer.logprobs),
        io=used.io,
        residency=_residency(runner),
        peak_rss_bytes=peak_rss(psutil.Process().memory_info().rss),
        experts=used.experts,
    )


def _residency(runner: Runner) -> dict[str, TierUse]:
    plan, lent = runner.plan, runner.lent_bytes
    table = plan.demand.embedding
    held = plan.pinned_bytes + plan.bank_bytes_held + plan.embedding_bytes + lent
    on_disk = plan.streamed_bytes + plan.bank_bytes_on_disk - lent
    if table is not None and not plan.embedding_bytes:
        on_disk += table.nbytes
    vram = {}
    if plan.device_budget_bytes is not None:
        on_device = plan.device_pinned_bytes + plan.device_bank_bytes_held
        vram = {"vram": TierUse(bytes=on_device, hit_rate=runner.telemetry.hit_rate)}
    return {
        **vram,
        "ram": TierUse(bytes=held, hit_rate=runner.telemetry.hit_rate),
        "nvme": TierUse(bytes=on_disk, hit_rate=1.0),
    }


def peak_rss(current: int) -> int:
    """Highest resident set of this process so far, in bytes."""
    try:
        import resource
    except ImportError:
        return current
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(current, peak if sys.platform == "darwin" else peak * 1024)
