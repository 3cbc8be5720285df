"""Results as JSON objects and as one line for people. Knows nothing of where they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from offload.results import Completion, EdgeUse, ExpertUse, Statistics, TierUse
from offload.units import format_duration, format_rate, format_size


def completion_json(completion: Completion) -> dict[str, Any]:
    """The object that `offload run --json` prints."""
    timings = completion.timings
    return {
        "text": completion.text,
        "tokens": list(completion.tokens),
        "prompt_tokens": completion.prompt_tokens,
        "finish_reason": completion.finish_reason,
        "timings": {
            "load_s": timings.load_s,
            "ttft_s": timings.ttft_s,
            "prefill_tps": timings.prefill_tps,
            "decode_tps": timings.decode_tps,
        },
        "io": io_json(completion.io),
        "residency": {
            tier: {"bytes": use.bytes, "hit_rate": use.hit_rate} for tier, use in completion.residency.items()
        },
        "peak_rss_bytes": completion.peak_rss_bytes,
        **({} if completion.experts is None else {"experts": expert_json(completion.experts)}),
    }


def expert_json(use: ExpertUse) -> dict[str, Any]:
    """How experts came."""
    return {**asdict(use), "hit_rate": use.hit_rate}


def io_json(io: Mapping[str, EdgeUse]) -> dict[str, Any]:
    """Traffic by edge."""
    return {
        edge: {"bytes": use.bytes, "busy_s": use.busy_s, "bandwidth_bps": use.bandwidth_bps} for edge, use in io.items()
    }


def completion_line(completion: Completion) -> str:
    """Prompt and answer in tokens, their speed, what was read, and the peak of memory."""
    timings = completion.timings
    parts = [
        f"prompt {completion.prompt_tokens} tokens, {timings.prefill_tps:.1f} tok/s",
        f"answer {len(completion.tokens)} tokens, {timings.decode_tps:.1f} tok/s",
        f"first token after {format_duration(timings.ttft_s)}",
    ]
    disk = disk_use(completion.io)
    if disk is not None:
        parts.append(f"{format_size(disk.bytes)} from disk at {format_rate(disk.bandwidth_bps)}")
    if completion.experts is not None:
        parts.append(f"experts {completion.experts.hit_rate:.0%} hit{traded(completion.experts)}")
    parts.append(f"peak {format_size(completion.peak_rss_bytes)}")
    return " · ".join(parts)


def traded(experts: ExpertUse) -> str:
    """How many experts were not computed as the model has them; empty when all were."""
    coarse = f"; {experts.coarse} computed with half of their bits" if experts.coarse else ""
    return coarse + (f"; {experts.skipped} left out" if experts.skipped else "")


def disk_use(io: Mapping[str, EdgeUse]) -> EdgeUse | None:
    """Reads of all edges that leave the disk, or None when nothing was read."""
    used = [use for edge, use in io.items() if edge.startswith("nvme->") and use.bytes]
    if not used:
        return None
    return EdgeUse(bytes=sum(use.bytes for use in used), busy_s=max(use.busy_s for use in used))


def resident_share(residency: Mapping[str, TierUse], model_bytes: int) -> float:
    """Share of the model's bytes that lie in memory or on the device."""
    resident = sum(use.bytes for tier, use in residency.items() if tier != "nvme")
    return min(1.0, resident / model_bytes) if model_bytes else 1.0


def statistics_lines(statistics: Statistics, model_bytes: int) -> list[str]:
    """What `/stats` shows: where the time went, what moved, what is held."""
    total = statistics.compute_s + statistics.wait_s + statistics.other_s
    lines = [
        f"{statistics.tokens} tokens in {statistics.passes} passes, {format_duration(total)}",
        f"computing {_share(statistics.compute_s, total)}, waiting {_share(statistics.wait_s, total)}, "
        f"the rest {_share(statistics.other_s, total)}; bound by {statistics.bound}",
    ]
    for edge, use in statistics.io.items():
        lines.append(f"{edge}: {format_size(use.bytes)} at {format_rate(use.bandwidth_bps)}")
    for tier, tier_use in statistics.residency.items():
        lines.append(
            f"{tier}: {format_size(tier_use.bytes)} of weights, {tier_use.hit_rate:.0%} of demands found there"
        )
    if statistics.experts is not None:
        experts = statistics.experts
        lines.append(
            f"experts: {experts.demanded} chosen, {experts.hit_rate:.0%} of them in memory; "
            f"{experts.fetched_ahead} read ahead, {_share(experts.used_ahead, experts.fetched_ahead)} of these needed"
            + traded(experts)
        )
    share = resident_share(statistics.residency, model_bytes)
    lines.append(f"{share:.0%} of the weights resident, {statistics.kv_tokens} tokens in the KV cache")
    lines.append(f"memory {format_size(statistics.rss_bytes)}, peak {format_size(statistics.peak_rss_bytes)}")
    return lines


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "0%"
