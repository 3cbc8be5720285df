"""`offload plan`: where everything would lie, what moves per token, and what more memory would buy. Loads no weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import typer
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offload.cli.grouping import grouped
from offload.cli.load_options import PlanOptions
from offload.cli.loading import make_plan, notes
from offload.cli.options import DebugOption, JsonOption, ModelArgument
from offload.cli.text import output_console
from offload.units import GIB, format_duration, format_rate, format_size, format_speed

if TYPE_CHECKING:
    from offload.plan import Plan
    from offload.what_if import Improvement

_BAR_WIDTH: Final = 30
_PARTS: Final = (
    ("pinned weights", "pinned_bytes"),
    ("room for experts", "bank_bytes"),
    ("token table", "embedding_bytes"),
    ("ring for streaming", "ring_bytes"),
    ("KV cache", "kv_bytes"),
    ("workspace", "workspace_bytes"),
    ("program", "base_bytes"),
    ("margin", "margin_bytes"),
)
_BOUGHT: Final = {
    "vram": "One more GiB of VRAM",
    "ram": "One more GiB of RAM",
    "disk": "A disk twice as fast",
}


@grouped
def plan(
    memory: PlanOptions, model: ModelArgument = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Show what would lie where in memory, and how fast it would run."""
    del debug
    found = make_plan(model, memory)
    for note in notes(found, memory):
        typer.echo(f"offload: note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(plan_json(found)))
    else:
        show(found, output_console())


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON object; sizes in bytes, times in seconds per token."""
    names = ("budget_bytes", "minimum_bytes", "model_bytes", "streamed_bytes", *(field for _, field in _PARTS))
    more = one_more(plan)
    return {
        **{name: getattr(plan, name) for name in names},
        "edges": dict(plan.edges),
        "streamed_bytes_at_start": plan.streamed_bytes_at(0),
        "compute_s": plan.compute_s,
        "stream_s": plan.stream_s,
        "predicted_tps": plan.predicted_tps,
        "predicted_full_context_tps": plan.predicted_tps_at(plan.ctx),
        "bound": plan.bound,
        "ctx": plan.ctx,
        "prefill_tokens_per_pass": plan.prefill_tokens_per_pass,
        "one_more_gib": None
        if more is None
        else {"predicted_tps": more.predicted_tps, "streamed_bytes": more.streamed_bytes},
        "would_buy": [better._asdict() for better in would_buy(plan)],
        "device_slots": list(plan.device_slots),
        "device_kv_bytes": plan.device_kv_bytes,
        "host_kv_layers": sorted(plan.host_kv),
        "placements": [{"block": str(p.key), "tier": p.tier, "bytes": p.nbytes} for p in plan.placements],
    }


def one_more(plan: Plan) -> Plan | None:
    """The plan with one more GiB, or None where nothing is read and memory buys nothing."""
    from offload.planning import with_budget  # which a help text need not wait for

    return with_budget(plan, plan.budget_bytes + GIB) if plan.streamed_bytes or plan.missed_bytes else None


def would_buy(plan: Plan) -> list[Improvement]:
    """See `offload.what_if`, which a help text need not wait for."""
    from offload.what_if import improvements

    return improvements(plan)


def show(plan: Plan, console: Console) -> None:
    """Draw the plan."""
    console.print(f"Memory: {format_size(plan.budget_bytes)}; {format_size(plan.minimum_bytes)} would do")
    console.print(_memory_table(plan))
    console.print(f"\nWeights: {format_size(plan.model_bytes)}")
    console.print(_placement_table(plan))
    if plan.device_budget_bytes is not None:
        console.print(f"\nKV cache: {format_size(plan.device_kv_bytes + plan.kv_bytes)}")
        console.print(_kv_table(plan))
    console.print()
    for line in verdict(plan):
        console.print(Text(line))


def verdict(plan: Plan) -> Iterator[str]:
    """What moves, how fast that is, what bounds it, and what would help."""
    if plan.missed_bytes:
        known = any(bank.curve for bank in plan.demand.banks)
        how = (
            "as often found in memory as in the recorded trace"
            if known
            else "counted as if all were chosen equally often"
        )
        yield f"Experts are {how}: {format_size(plan.missed_bytes)} missed per token"
    for edge, bandwidth_bps in plan.edges.items():
        yield f"{edge}: {_crossing(plan, bandwidth_bps) if edge == 'ram->vram' else _moved(plan, bandwidth_bps)}"
    if plan.demand.kv_streamed_bytes:
        yield (
            f"KV cache: {format_size(plan.kv_bytes)} of it in memory; {format_size(plan.demand.kv_streamed_bytes)} are read "
            f"for a token at the end of the context"
        )
    times = f"computing {format_duration(plan.compute_s)}, reading {format_duration(plan.stream_s)} per token"
    yield f"About {format_speed(plan.predicted_tps)}, bound by {plan.bound} ({times})"
    at_end = plan.predicted_tps_at(plan.ctx)
    if at_end < 0.95 * plan.predicted_tps:
        yield f"At the end of the full context of {plan.ctx} tokens: about {format_speed(at_end)}"
    if plan.predicted_tps < 1:
        yield f"That is slow, a token every {format_duration(1 / plan.predicted_tps)}, and works"
    yield f"Context {plan.ctx} tokens; a prompt is read in passes of {plan.prefill_tokens_per_pass} tokens"
    for what, tps, factor in would_buy(plan):
        yield f"{_BOUGHT[what]} would give about {format_speed(tps)} ({factor:.2f}x)"


def _crossing(plan: Plan, bandwidth_bps: float) -> str:
    if not plan.link_bytes:
        return "nothing of the matrices: they stay on the device"
    shared = f", {format_size(plan.shared_bytes)} are computed by the CPU instead" if plan.shared_bytes else ""
    return f"{format_size(plan.link_bytes)} per token at {format_rate(bandwidth_bps)}{shared}"


def _moved(plan: Plan, bandwidth_bps: float) -> str:
    first, last = plan.streamed_bytes_at(0), plan.streamed_bytes_at(plan.ctx)
    if not last:
        where = "fits into what only prompts need" if plan.from_disk or plan.bank_bytes_on_disk else "stays in memory"
        return f"nothing: all that tokens need {where}"
    why = "with the cache that is on disk" if plan.demand.kv_streamed_bytes else "whose cache holds weights until then"
    later = "" if first == last else f", {format_size(last)} at the end of a full context, {why}"
    return f"{format_size(first)} per token at {format_rate(bandwidth_bps)}{later}"


def _memory_table(plan: Plan) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    parts = [(label, getattr(plan, field)) for label, field in _PARTS if field != "bank_bytes" or plan.bank_slots]
    free = plan.budget_bytes - sum(nbytes for _, nbytes in parts)
    for label, nbytes in [*parts, ("left over", max(0, free))]:
        table.add_row(label, _bar(nbytes, plan.budget_bytes), format_size(nbytes))
    return table


def _placement_table(plan: Plan) -> Table:
    table = Table("tier", "", "blocks", "size", box=None, padding=(0, 2, 0, 0))
    nbytes: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    for placement in plan.placements:
        nbytes[placement.tier] += placement.nbytes
        blocks[placement.tier] += 1
    names = {"vram": "device", "ram": "memory, pinned", "nvme": "disk, streamed"}
    for tier, label in names.items():
        if blocks[tier]:
            table.add_row(label, _bar(nbytes[tier], plan.model_bytes), str(blocks[tier]), format_size(nbytes[tier]))
    held, count, size = experts_held(plan)
    if count:
        if plan.device_slots:
            on_device = plan.device_bank_bytes_held
            table.add_row(
                "device, experts", _bar(on_device, plan.model_bytes), *_row(sum(plan.device_slots), on_device)
            )
        table.add_row(
            "memory, experts", _bar(held * size // count, plan.model_bytes), *_row(held, held * size // count)
        )
        left = count - held - sum(plan.device_slots)
        if left > 0:
            rest = left * size // count
            table.add_row("disk, experts", _bar(rest, plan.model_bytes), *_row(left, rest))
    return table


def _kv_table(plan: Plan) -> Table:
    table = Table("tier", "", "layers", "size", box=None, padding=(0, 2, 0, 0))
    total, there = plan.device_kv_bytes + plan.kv_bytes, len(plan.host_kv)
    layers = str(len(plan.demand.kv.reaches) - there) if plan.demand.kv is not None else "all"
    if plan.device_kv_bytes:
        table.add_row("device", _bar(plan.device_kv_bytes, total), layers, format_size(plan.device_kv_bytes))
    if there:
        table.add_row("memory, attended to by the CPU", _bar(plan.kv_bytes, total), *_row(there, plan.kv_bytes))
    return table


def experts_held(plan: Plan) -> tuple[int, int, int]:
    """How many experts memory holds, how many there are, and the bytes of all."""
    banks = plan.demand.banks if plan.bank_slots else ()
    return (
        sum(plan.bank_slots),
        sum(bank.num_experts for bank in banks),
        sum(b.num_experts * b.expert_bytes for b in banks),
    )


def _row(count: int, nbytes: int) -> tuple[str, str]:
    return str(count), format_size(nbytes)


def _bar(part: int, whole: int) -> ProgressBar:
    return ProgressBar(total=max(whole, 1), completed=part, width=_BAR_WIDTH)
