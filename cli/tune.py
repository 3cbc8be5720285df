"""`offload tune`: tries what could make a model with experts faster, and remembers what did."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from offload.cli.grouping import grouped
from offload.cli.load_options import AutoChoice, LoadOptions
from offload.cli.loading import open_engine
from offload.cli.models import resolve_model
from offload.cli.options import DebugOption, ExpertModelArgument, JsonOption, QuietOption
from offload.cli.progress import Bars, bars_wanted
from offload.cli.run import read_prompt
from offload.errors import UsageError
from offload.prefetch.routing import RoutingTrace
from offload.prefetch.trace_file import write_routing
from offload.trials import Attempt, Sample, search
from offload.tuning import Tuning, load_tuning, save_tuning, trace_path

if TYPE_CHECKING:
    from offload.plan import Plan

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
    model: ExpertModelArgument,
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
    if load.coarse_experts_below:
        raise UsageError("--coarse-experts-below: runs with it may differ, and so cannot be compared; tune without it")
    with Bars(enabled=bars_wanted(quiet=quiet or as_json)) as bars:
        trials = Trials(path, load, text, max_tokens, bars, says=not as_json)
        with open_engine(path, load, bars) as engine:
            share = share_to_tune(engine.plan, path.name)
            bars.update("recording", 0, None)
            trace = engine.record_routing(text, max_tokens=max_tokens, origin="tune", temperature=0, ignore_eos=True)
        best, attempts = search(trace, share, trials.measure, trials.begin, trials.end)
        best, place = keep(best, trace)
    report(best, attempts, place, as_json=as_json)


def share_to_tune(plan: Plan, name: str) -> float:
    """Of the experts, what memory holds.

    Raises:
        UsageError: there are none, or all fit.
    """
    if not plan.demand.banks:
        raise UsageError(f"{name}: it has no experts, and so nothing to tune; `offload bench` measures it")
    if plan.expert_share >= 1:
        raise UsageError(f"{name}: all experts fit into memory; there is nothing to tune. Try a smaller --ram")
    return plan.expert_share


class Trials:
    """Decodes with one tuning after the other, and says on the terminal which, and what came of it."""

    def __init__(self, path: Path, load: LoadOptions, text: str, max_tokens: int, bars: Bars, *, says: bool) -> None:
        self._path = path
        self._load = load
        self._text = text
        self._max_tokens = max_tokens
        self._bars = bars
        self._says = says
        self._name = ""

    def begin(self, name: str) -> None:
        """Of a comparison."""
        self._name = name

    def measure(self, tuning: Tuning) -> Sample:
        """A run of its own, with a cache that is empty at first."""
        chosen = replace(
            self._load, expert_policy=tuning.policy, prefetch=AutoChoice(tuning.prefetch), workers=tuning.workers
        )
        with open_engine(self._path, chosen, self._bars) as engine:
            self._bars.update(f"trying {self._name}", 0, None)
            done = engine.generate(self._text, max_tokens=self._max_tokens, temperature=0, ignore_eos=True)
            self._bars.stop()
        return Sample(done.tokens, done.timings.decode_tps)

    def end(self, attempt: Attempt) -> None:
        """Of a comparison."""
        self._bars.stop()
        if self._says:
            gains = ", then ".join(f"{gain:.2f}x" for gain in attempt.gains)
            typer.echo(f"{attempt.name}: {gains} as fast{'; kept' if attempt.kept else ''}")


def keep(best: Tuning, trace: RoutingTrace) -> tuple[Tuning, Path]:
    """Saves what was found; a longer trace that was recorded before stays, with what it tells."""
    known = load_tuning(trace.model)
    if known is not None and known.tokens > trace.num_tokens:
        best = replace(best, curves=known.curves, tokens=known.tokens, origin=known.origin)
    else:
        write_routing(trace_path(trace.model), trace)
    return best, save_tuning(trace.model, best)


def report(best: Tuning, attempts: list[Attempt], place: Path, *, as_json: bool) -> None:
    """What is kept; as JSON, also what was tried."""
    if as_json:
        found: dict[str, Any] = {"kept": asdict(best), "attempts": [asdict(attempt) for attempt in attempts]}
        typer.echo(json.dumps({**found, "path": str(place)}))
        return
    workers = "default" if best.workers is None else str(best.workers)
    typer.echo(f"kept: policy {best.policy}, prefetch {best.prefetch}, requests in flight {workers} ({place})")
