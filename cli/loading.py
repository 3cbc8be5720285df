"""From options to an engine or a plan. The one place of the command line that touches the engine.

`offload.engine` is imported when a model is opened and not before: it loads numpy and the kernel libraries, which
`offload run --help` and a usage error need not wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import psutil
import typer

from offload.cli.load_options import AutoChoice, LoadOptions, PlanOptions
from offload.cli.models import resolve_model
from offload.cli.progress import Bars
from offload.errors import OffloadError
from offload.units import format_size

OPENING: Final = "opening the model"
PHASES: Final = {"load": "reading the weights"}

if TYPE_CHECKING:
    from offload.engine import Engine
    from offload.plan import Plan


def _engine_module() -> Any:
    return import_module("offload.engine")


@contextmanager
def open_engine(model: Path | None, options: LoadOptions, bars: Bars) -> Iterator[Engine]:
    """Load the model, and write the trace when it was asked for, also after an error.

    The trace may fail, so what the block has found is printed within it.
    """
    path = resolve_model(model)
    bars.update(OPENING, 0, None)

    def loading(phase: str, done: int, total: int) -> None:
        bars.end(OPENING)
        bars.update(PHASES.get(phase, phase), done, total)

    engine: Engine = _engine_module().load(path, **options.loading(), progress=loading)
    with engine:
        bars.stop()
        for note in notes(engine.plan, options):
            typer.echo(f"offload: note: {note}", err=True)
        try:
            yield engine
        except BaseException:
            with suppress(OffloadError):  # what failed first is what the user is told
                write_trace(engine, options)
            raise
        write_trace(engine, options)


def write_trace(engine: Engine, options: LoadOptions) -> None:
    """Write the trace when it was asked for.

    Raises:
        StorageError: its file cannot be written.
    """
    if options.trace is not None:
        engine.write_trace(options.trace)


def notes(plan: Plan, options: PlanOptions) -> Iterator[str]:
    """What the user asked for and can have, but hardly meant; and why a card is not used."""
    if options.device == "auto" and plan.device_budget_bytes is None:
        from offload.device_choice import choose_device

        if choose_device().note:
            yield choose_device().note
    machine = psutil.virtual_memory().total
    if options.ram is not None and plan.budget_bytes > machine:
        yield f"--ram {format_size(plan.budget_bytes)} is more than this machine has ({format_size(machine)})"
    if options.host_compute is AutoChoice.on and plan.device_budget_bytes is None:
        yield "--host-compute: there is no device, the CPU computes everything"
    if isinstance(options, LoadOptions):
        yield from expert_notes(plan, options)
    if plan.ctx > plan.trained_ctx:
        yield f"--ctx {plan.ctx} is longer than the {plan.trained_ctx} tokens that the model was trained for"


def expert_notes(plan: Plan, options: LoadOptions) -> Iterator[str]:
    """Options for experts that change nothing here."""
    given = {
        "--expert-policy": options.expert_policy != "auto",
        "--prefetch": options.prefetch is not AutoChoice.auto,
        "--skip-experts-below": options.skip_experts_below > 0,
        "--expert-pack": options.expert_pack is not None,
    }
    names = ", ".join(name for name, is_given in given.items() if is_given)
    if names and not plan.demand.banks:
        yield f"{names}: the model has no experts"
    elif options.expert_pack is not None and not options.coarse_experts_below:
        yield "--expert-pack: nothing is read from it without --coarse-experts-below"


def make_plan(model: Path | None, options: PlanOptions) -> Plan:
    """The plan for the model, without loading its weights."""
    return cast("Plan", _engine_module().plan_model(resolve_model(model), **options.planning()))
