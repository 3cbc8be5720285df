"""`offload tune`: tries what could make a model with experts faster, and remembers what did."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from offload.cli.grouping import grouped
from offload.cli.loading import open_engine
from offload.cli.models import resolve_model
from offload.cli.options import DebugOption, JsonOption, LoadOptions, ModelArgument, PrefetchChoice, QuietOption
from offload.cli.progress import Bars, bars_wanted
from offload.cli.run import read_prompt
from offload.errors import UsageError
from offload.prefetch.trace_file import write_routing
from offload.trials import Attempt, Sample, search
from offload.tuning import Tuning, save_tuning, trace_path

_PROMPT: Final = "Explain, step by step and with an example, how a bicycle stays upright while it is ridden."

PromptOption = Annotated[
    str | None, typer.Option("--prompt", "-p", help="What to decode. Left out: a question.", show_default=False)
]
FileOption = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.", show_default=False)
]
TokensOption = Annotated[int, typer.Option("--max-tokens", "-n", min=16, max=4096, help="Tokens of each run.")]


@grouped
def tune(
    load: LoadOptions,
    model: ModelArgument = None,
    prompt: PromptOption = None,
    file: FileOption = None,
    max_tokens: TokensOption = 64,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find what makes a model with experts fastest on this machine."""
    del debug
    text = _PROMPT if prompt is None and file is None else read_prompt(prompt, file)
    path = resolve_model(model)
    with Bars(enabled=bars_wanted(quiet=quiet or as_json)) as bars:
        with open_engine(path, load, bars) as engine:
            bars.update("recording", 0, None)
            trace = engine.record_routing(text, max_tokens=max_tokens, origin="tune", temperature=0, ignore_eos=True)
            plan = engine.plan
        share = sum(plan.bank_slots) / sum(bank.num_experts for bank in plan.demand.banks)
        if share >= 1:
            raise UsageError(f"{path.name}: all experts fit into memory; there is nothing to tune. Try a smaller --ram")

        def measure(tuning: Tuning) -> Sample:
            chosen = replace(
                load, expert_policy=tuning.policy, prefetch=PrefetchChoice(tuning.prefetch), workers=tuning.workers
            )
            with open_engine(path, chosen, bars) as engine:
                done = engine.generate(text, max_tokens=max_tokens, temperature=0, ignore_eos=True)
            return Sample(done.tokens, done.timings.decode_tps)

        best, attempts = search(trace, share, measure, lambda name: bars.update(f"trying {name}", 0, None))
        write_routing(trace_path(trace.model), trace)
        place = save_tuning(trace.model, best)
    report(best, attempts, place, as_json=as_json)


def report(best: Tuning, attempts: list[Attempt], place: Path, *, as_json: bool) -> None:
    """What was tried and what is kept."""
    if as_json:
        found: dict[str, Any] = {"kept": asdict(best), "attempts": [asdict(attempt) for attempt in attempts]}
        typer.echo(json.dumps({**found, "path": str(place)}))
        return
    for attempt in attempts:
        gains = ", then ".join(f"{gain:.2f}x" for gain in attempt.gains)
        typer.echo(f"{attempt.name}: {gains} as fast{'; kept' if attempt.kept else ''}")
    workers = "default" if best.workers is None else str(best.workers)
    typer.echo(f"kept: policy {best.policy}, prefetch {best.prefetch}, requests in flight {workers} ({place})")
