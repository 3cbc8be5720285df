"""`offload pack`: writes the side file with coarse copies of a model's experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offload.cli.interrupt import signals_unwind
from offload.cli.models import resolve_model
from offload.cli.options import DebugOption, ExpertModelArgument, QuietOption
from offload.cli.progress import Bars, bars_wanted
from offload.cli.text import user_path
from offload.packing import write_pack
from offload.units import format_size

OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Where to write. Left out: beside the model, NAME.pack.gguf.", show_default=False
    ),
]


def pack(
    model: ExpertModelArgument, output: OutputOption = None, quiet: QuietOption = False, debug: DebugOption = False
) -> None:
    """Write the side file from which experts of little weight are read with half of their bits.

    It is as large as all experts of the model.
    """
    del debug
    path = resolve_model(model)
    place = path.with_name(f"{path.stem}.pack.gguf") if output is None else user_path(output)
    with signals_unwind(), Bars(enabled=bars_wanted(quiet=quiet)) as bars:
        nbytes = write_pack(path, place, lambda done, total: bars.update("packing", done, total))
    typer.echo(f"{place}: {format_size(nbytes)}; use it with --expert-pack {place} --coarse-experts-below 0.1")
