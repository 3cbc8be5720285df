"""`offload bench`: prefill and decode speed as a table, beside the share of the disk's limit that was reached.

The limit is measured in the same run on the model's own largest file, right before the engine is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from offload.cli.grouping import grouped
from offload.cli.load_options import LoadOptions
from offload.cli.loading import open_engine
from offload.cli.models import resolve_model
from offload.cli.options import DebugOption, JsonOption, ModelArgument, QuietOption
from offload.cli.progress import Bars, bars_wanted
from offload.cli.report import disk_use, resident_share
from offload.cli.text import output_console
from offload.errors import UsageError
from offload.models.checkpoint import open_checkpoint
from offload.tiers.probe import measure_disk
from offload.units import format_rate, format_size, format_speed

if TYPE_CHECKING:
    from offload.engine import Engine
    from offload.results import Completion

_PROMPT_TOKENS: Final = 16  # before a decode test: enough to have a context, too few to cost time
_PROBE_S: Final = 2.0
_ANY_WIDTH: Final = 10_000

PrefillOption = Annotated[int, typer.Option("--n-prompt", "-p", help="Tokens of the prefill test; 0: none.", min=0)]
DecodeOption = Annotated[int, typer.Option("--n-gen", "-n", help="Tokens of the decode test; 0: none.", min=0)]
RepeatOption = Annotated[int, typer.Option("--repetitions", "-r", help="Runs of each test; the median counts.", min=1)]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One test: medians over its runs. `disk_share` is of the probed bandwidth; both are None when nothing was read.

    `bytes_per_token` is what was read; `hit_rate` and `misses_per_token` are of experts, None where all are in memory.
    """

    test: str
    tokens_per_second: float
    runs: tuple[float, ...]
    disk_bps: float | None
    disk_share: float | None
    resident: float
    bytes_per_token: float
    bound: str
    hit_rate: float | None = None
    misses_per_token: float | None = None


@grouped
def bench(
    load: LoadOptions,
    model: ModelArgument = None,
    n_prompt: PrefillOption = 512,
    n_gen: DecodeOption = 32,
    repetitions: RepeatOption = 3,
    as_json: JsonOption = False,
    markdown: MarkdownOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure prefill and decode speed."""
    del debug
    if not n_prompt and not n_gen:
        raise UsageError("--n-prompt 0 and --n-gen 0: nothing to measure")
    if n_gen == 1:
        raise UsageError("--n-gen 1: the first token ends the prompt's time; give 2 or more")
    path = resolve_model(model)
    file = max(open_checkpoint(path).files, key=lambda file: file.stat().st_size)
    with Bars(enabled=bars_wanted(quiet=quiet or as_json)) as bars, ExitStack() as stack:
        bars.update("measuring the disk", 0, None)
        limit_bps = measure_disk(file, seconds=_PROBE_S)
        bars.end("measuring the disk")
        engine = stack.enter_context(open_engine(path, load, bars))
        rows = measure(engine, n_prompt, n_gen, repetitions, limit_bps, bars)
        report = {
            "model": engine.model_name,
            "model_bytes": engine.plan.model_bytes,
            "budget_bytes": engine.plan.budget_bytes,
            "predicted_tps": engine.plan.predicted_tps,
            "disk_limit_bps": limit_bps,
            "peak_rss_bytes": engine.statistics().peak_rss_bytes,
            "rows": [asdict(row) for row in rows],
        }
        write_report(report, rows, as_json=as_json, markdown=markdown)


def measure(engine: Engine, n_prompt: int, n_gen: int, repetitions: int, limit_bps: float, bars: Bars) -> list[Row]:
    """Run each test once unmeasured and `repetitions` times measured.

    Every run has token ids of its own, so that no run finds the KV cache of the one before. They are below 256, which
    every vocabulary has.
    """
    tests: list[tuple[str, int, int, Callable[[Completion], float]]] = []
    if n_prompt:
        tests.append((f"pp{n_prompt}", n_prompt, 1, lambda completion: completion.timings.prefill_tps))
    if n_gen:
        tests.append((f"tg{n_gen}", _PROMPT_TOKENS, n_gen, lambda completion: completion.timings.decode_tps))
    rows = []
    for name, prompt_tokens, max_tokens, speed in tests:
        completions = []
        for run in range(repetitions + 1):
            prompt = [(7 * place + run + 1) % 256 for place in range(prompt_tokens)]
            completions.append(engine.generate(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
            bars.update(name, run + 1, repetitions + 1)
        tokens, bound = prompt_tokens + max_tokens - 1, engine.statistics().bound
        rows.append(
            summarize(name, completions[1:], speed, limit_bps, engine.plan.model_bytes, tokens=tokens, bound=bound)
        )
    bars.stop()
    return rows


def summarize(
    name: str, completions: list[Completion], speed: Callable[[Completion], float], limit_bps: float, model_bytes: int,
    *, tokens: int, bound: str,
) -> Row:  # fmt: skip
    """Medians of the measured runs, each of so many tokens."""
    experts = [run.experts for run in completions if run.experts is not None]
    runs = tuple(speed(completion) for completion in completions)
    uses = [use for completion in completions if (use := disk_use(completion.io)) is not None]
    disk_bps = median(use.bandwidth_bps for use in uses) if uses else None
    return Row(
        test=name,
        tokens_per_second=median(runs),
        runs=runs,
        disk_bps=disk_bps,
        disk_share=disk_bps / limit_bps if disk_bps is not None else None,
        resident=resident_share(completions[-1].residency, model_bytes),
        bytes_per_token=median(sum(use.bytes for use in run.io.values()) / tokens for run in completions),
        bound=bound,
        hit_rate=median(use.hit_rate for use in experts) if experts else None,
        misses_per_token=median(use.misses for use in experts) / tokens if experts else None,
    )


def write_report(report: dict[str, Any], rows: list[Row], *, as_json: bool, markdown: bool) -> None:
    """One JSON object, a Markdown table, or a table for the terminal."""
    if as_json:
        typer.echo(json.dumps(report))
        return
    header = (
        "model",
        "size",
        "memory",
        "test",
        "tokens/s",
        "disk",
        "of its limit",
        "resident",
        "experts hit",
        "read a token",
        "bound",
    )
    sizes = (format_size(report["model_bytes"]), format_size(report["budget_bytes"]))
    cells = [(str(report["model"]), *sizes, *_cells(row)) for row in rows]
    if markdown:
        for line in (header, ("---",) * len(header), *cells):
            typer.echo(f"| {' | '.join(line)} |")
    else:
        show(header, cells, output_console())
    typer.echo(f"disk limit {format_rate(report['disk_limit_bps'])}, predicted {format_speed(report['predicted_tps'])}")


def show(header: tuple[str, ...], cells: list[tuple[str, ...]], console: Console) -> None:
    """A line for each row, or, where the terminal is too narrow for that, a column: no figure is ever cut."""
    columns = [Column(overflow="fold") for _ in range(len(cells) + 1)]
    wide, tall = Table(*header, box=None), Table(*columns, box=None, show_header=False)
    for line in cells:
        wide.add_row(*map(escape, line))
    for line in zip(header, *cells, strict=True):
        tall.add_row(*map(escape, line))
    needed = console.measure(wide, options=console.options.update(max_width=_ANY_WIDTH)).maximum
    console.print(wide if needed <= console.width else tall)


def _cells(row: Row) -> tuple[str, ...]:
    disk = "-" if row.disk_bps is None else format_rate(row.disk_bps)
    share = "-" if row.disk_share is None else f"{row.disk_share:.0%}"
    hits = "-" if row.hit_rate is None else f"{row.hit_rate:.0%}, {row.misses_per_token:.3g} misses a token"
    return (
        row.test, f"{row.tokens_per_second:.2f}", disk, share, f"{row.resident:.0%}", hits,
        format_size(row.bytes_per_token), row.bound,
    )  # fmt: skip
