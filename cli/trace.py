"""`offload trace`: records what routers decide, and replays policies against it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from offload.cli.grouping import grouped
from offload.cli.load_options import LoadOptions
from offload.cli.loading import open_engine
from offload.cli.options import DebugOption, ExpertModelArgument, JsonOption, QuietOption
from offload.cli.progress import Bars, bars_wanted
from offload.cli.run import read_prompt
from offload.cli.text import output_console, user_path
from offload.errors import StorageError, UsageError
from offload.prefetch.locality import segment_cache_hit_rate, segment_routing_performance
from offload.prefetch.policies import DEFAULT_EVICTION, EVICTION
from offload.prefetch.prediction import PREDICTORS
from offload.prefetch.replay import recall, replay, whole
from offload.prefetch.routing import RoutingTrace, effective_experts
from offload.prefetch.trace_file import check_place, read_routing, write_routing
from offload.tuning import LEAST_TOKENS, learn, save_tuning, trace_path
from offload.units import format_size, parse_size

if TYPE_CHECKING:
    from offload.engine import Engine

OPTIMUM: Final = "belady"
_SHARES: Final = (0.1, 0.25, 0.5, 0.75)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="The text. Left out: --file, else standard input.", show_default=False),
]
FileOption = Annotated[Path | None, typer.Option("--file", "-f", help="Read the text from a file.", show_default=False)]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Where to write. Left out: where plan and chat look for it.", show_default=False
    ),
]
AnswerTokensOption = Annotated[
    int,
    typer.Option("--max-tokens", "-n", min=0, help="Record the answer to a prompt too; 0: every token of a text."),
]
TraceArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A routing trace.", show_default=False)]
RamOption = Annotated[
    list[str] | None,
    typer.Option("--ram", help="Memory for the whole process, such as 6GiB. May be repeated.", show_default=False),
]
CacheOption = Annotated[
    list[float] | None,
    typer.Option(
        "--cache", help="Percent of the experts in memory. May be repeated.", min=0.1, max=100, show_default=False
    ),
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option("--policy", help="A policy to replay. May be repeated. Left out: all.", show_default=False),
]
PredictorsOption = Annotated[
    bool, typer.Option("--predictors", help="Also show how much of a layer's choice can be told layers before.")
]


@app.command()
@grouped
def record(
    load: LoadOptions,
    model: ExpertModelArgument,
    prompt: PromptOption = None,
    file: FileOption = None,
    max_tokens: AnswerTokensOption = 0,
    output: OutputOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a text through a model with experts and write down what its routers choose."""
    del debug
    text = read_prompt(prompt, file)
    if output is not None:
        output = checked_output(user_path(output))
    with Bars(enabled=bars_wanted(quiet=quiet)) as bars, open_engine(model, load, bars) as engine:
        trace = record_in_parts(engine, text, max_tokens, origin=str(file) if file else "a prompt", bars=bars)
        if output is None and trace.num_tokens < LEAST_TOKENS:
            raise UsageError(
                f"{trace.num_tokens} tokens are too few to learn from, {LEAST_TOKENS} would do: give a longer text, or "
                "--output to write down what there is"
            )
        path = output or trace_path(trace.model)
        write_routing(path, trace)
        lines = [f"{trace.num_tokens} tokens through {len(trace.layers)} layers, written to {path}"]
        if output is None:
            bars.update("replaying", 0, None)
            lines.append(remember(trace, engine))
        bars.stop()
        for line in lines:
            typer.echo(line)


def checked_output(path: Path) -> Path:
    """Where a trace can be written, found out before the work and not after it.

    Raises:
        UsageError: no such folder. StorageError: something else is there.
    """
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: no such folder {path.parent}; make it, or choose another place")
    check_place(path)
    return path


def record_in_parts(engine: Engine, text: str, max_tokens: int, origin: str, bars: Bars) -> RoutingTrace:
    """The routing of a prompt and its answer, or of a text of any length, by parts that the context holds.

    Raises:
        UsageError: the text has no tokens, or the model no experts.
    """
    if max_tokens:
        bars.update("recording", 0, None)
        return engine.record_routing(text, max_tokens=max_tokens, origin=origin)
    tokens = engine.tokenize(text)
    if not tokens:
        raise UsageError("the text is empty: nothing to record")
    parts = []
    for start in range(0, len(tokens), engine.ctx):
        bars.update("recording", start, len(tokens))
        parts.append(engine.record_routing(tokens[start : start + engine.ctx], origin=origin))
    return RoutingTrace.joined(parts)


def remember(trace: RoutingTrace, engine: Engine) -> str:
    """Lets plan and chat know what a replay finds best for this model and budget."""
    tuning = learn(trace, min(engine.plan.expert_share, 0.9))
    try:
        save_tuning(trace.model, tuning)
    except StorageError as error:
        return f"not remembered: {error}"
    suits = "which decoding showed to be fastest" if tuning.by == "trial" else "which suits it best"
    if tuning.policy == DEFAULT_EVICTION and tuning.by == "replay":
        suits = "the default, since no other is clearly better"
    return f"policy {tuning.policy}, {suits}; plan predicts from this trace from now on"


@app.command("replay")
def replay_trace(
    file: TraceArgument,
    ram: RamOption = None,
    cache: CacheOption = None,
    policy: PolicyOption = None,
    predictors: PredictorsOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Replay policies against a trace: hit rates and bytes per token, beside the optimum."""
    del debug
    unknown = [name for name in policy or () if name not in EVICTION]
    if unknown:
        hint = f"; {OPTIMUM}, the optimum, is always shown" if unknown[0] == OPTIMUM else ""
        raise UsageError(f"--policy {unknown[0]}: choose {', '.join(EVICTION)}{hint}")
    trace = whole(read_routing(user_path(file)))
    if trace.num_tokens < 2:
        raise UsageError(f"{file}: {trace.num_tokens} tokens that reached all layers; record a longer text")
    report = make_report(trace, sizes(trace, ram, cache), list(dict.fromkeys(policy or EVICTION)))
    if predictors:
        report["predictors"] = list(recalls(trace))
    if as_json:
        typer.echo(json.dumps(report))
    else:
        show(report)


def sizes(trace: RoutingTrace, ram: list[str] | None, cache: list[float] | None) -> dict[str, dict[int, int]]:
    """Slots by bank, for each memory size or share that was asked for.

    Raises:
        UsageError: a size leaves no room for experts.
    """
    found: dict[str, dict[int, int]] = {}
    for size in ram or ():
        left = parse_size(size) - trace.fixed_bytes
        slots = trace.slots(max(0, left))
        if min(slots.values()) < trace.num_used:
            least = trace.fixed_bytes + trace.num_used * sum(
                trace.slot_bytes[rows[0]] for rows in trace.rows_of_bank.values()
            )
            raise UsageError(f"--ram {size}: too little for this trace's model; it needs at least {format_size(least)}")
        found[size] = slots
    for percent in cache or ():
        found[f"{percent:g}%"] = trace.share(percent / 100)
    return found or {f"{share:.0%}": trace.share(share) for share in _SHARES}


def make_report(trace: RoutingTrace, slots: dict[str, dict[int, int]], policies: list[str]) -> dict[str, Any]:
    """Hit rate and bytes per token by size and policy, and figures of the trace itself."""
    warm_up = min(128, trace.num_tokens // 4)
    rows = []
    for size, by_bank in slots.items():
        for name in (*policies, OPTIMUM):
            found = replay(trace, by_bank, EVICTION.get(name), warm_up=warm_up)
            rows.append({
                "size": size, "slots": sum(by_bank.values()), "policy": name, "hit_rate": found.hit_rate,
                "bytes_per_token": found.nbytes / max(1, found.tokens),
            })  # fmt: skip
    long_enough = trace.num_tokens >= 16
    return {
        "origin": trace.origin, "tokens": trace.num_tokens, "layers": len(trace.layers),
        "experts": trace.num_experts, "used": trace.num_used, "effective_experts": effective_experts(trace),
        "segment_routing_performance": segment_routing_performance(trace) if long_enough else None,
        "segment_cache_hit_rate": segment_cache_hit_rate(trace) if long_enough else None,
        "default_policy": DEFAULT_EVICTION, "rows": rows,
    }  # fmt: skip


def recalls(trace: RoutingTrace) -> Iterator[dict[str, Any]]:
    """How many of a layer's experts each predictor names, when it names as many as are used, and twice as many."""
    for ahead in range(1, max(1, trace.lookahead) + 1):
        for name, make in PREDICTORS.items():
            found = {"ahead": ahead, "predictor": name}
            for key, width in (("recall", trace.num_used), ("recall_of_twice", 2 * trace.num_used)):
                found[key], _ = recall(trace, make(len(trace.layers), trace.num_experts), ahead, width)
            yield found


def show(report: dict[str, Any]) -> None:
    """The report for people."""
    console = output_console()
    console.print(
        f"{report['tokens']} tokens, {report['layers']} layers, {report['used']} of {report['experts']} experts each; "
        f"{report['effective_experts']:.1f} effectively in use"
    )
    if report["segment_routing_performance"] is not None:
        console.print(
            f"16 tokens in a row, the best fixed choice of as many experts as a token uses: "
            f"{report['segment_routing_performance']:.2f} of what they choose (SRP); "
            f"of twice as many: {report['segment_cache_hit_rate']:.2f} (SCH). "
            f"1 suits offloading, {report['used'] / report['experts']:.2f} is chance"
        )
    if "predictors" in report:
        table = Table("layers ahead", "predictor", "named as many as used", "twice as many", box=None)
        for row in report["predictors"]:
            table.add_row(str(row["ahead"]), row["predictor"], f"{row['recall']:.1%}", f"{row['recall_of_twice']:.1%}")
        console.print(table)
        console.print()
    table = Table("memory", "slots", "policy", "hit rate", "of the optimum", "read per token", box=None)
    best = {row["size"]: row["hit_rate"] for row in report["rows"] if row["policy"] == OPTIMUM}
    for row in report["rows"]:
        share = row["hit_rate"] / best[row["size"]] if best[row["size"]] else 1.0
        name = f"{row['policy']} (default)" if row["policy"] == report["default_policy"] else row["policy"]
        cells = (row["size"], str(row["slots"]), name, f"{row['hit_rate']:.1%}", f"{share:.0%}")
        table.add_row(*cells, format_size(row["bytes_per_token"]))
    console.print(table)
