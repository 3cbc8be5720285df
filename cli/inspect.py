"""`offload inspect`: what a model file or folder holds, read from its headers. Code that a folder brings is never run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.table import Column, Table

from offload.cli.inspect_text import describe_text
from offload.cli.models import resolve_model
from offload.cli.options import DebugOption, JsonOption, ModelArgument
from offload.cli.streams import json_text
from offload.cli.text import output_console, printable
from offload.models.checkpoint import open_checkpoint
from offload.models.checkpoint.base import Checkpoint
from offload.units import format_size

_SHOWN: Final = 200  # characters of a value that a table on a terminal shows
TensorsOption = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]


def inspect(
    model: ModelArgument = None, tensors: TensorsOption = False, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Show what a model file holds."""
    del debug
    checkpoint = open_checkpoint(resolve_model(model))
    facts = describe(checkpoint)
    if tensors:
        facts["tensors"] = [tensor_json(checkpoint, name) for name in checkpoint.tensors]
    if as_json:
        typer.echo(json_text(facts))
    else:
        show(facts)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts as a JSON object."""
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": checkpoint.architecture,
        "name": _first(checkpoint, "general.name", "_name_or_path"),
        "license": _first(checkpoint, "general.license", "license"),
        "parameters": sum(tensor.num_elements for tensor in checkpoint.tensors.values()),
        "bytes": checkpoint.nbytes,
        "context_length": _first(checkpoint, f"{checkpoint.architecture}.context_length", "max_position_embeddings"),
        "elements": element_histogram(checkpoint),
        **describe_text(checkpoint),
        "remote_code": asks_for_code(checkpoint),
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in checkpoint.files],
        "fingerprint": checkpoint.fingerprint,
    }


def element_histogram(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Tensors, parameters and bytes by element type, the most bytes first."""
    found: dict[str, Counter[str]] = {}
    for tensor in checkpoint.tensors.values():
        counts = found.setdefault(tensor.element.name, Counter())
        counts.update(tensors=1, parameters=tensor.num_elements, bytes=tensor.extent.nbytes)
    return {name: dict(counts) for name, counts in sorted(found.items(), key=lambda item: -item[1]["bytes"])}


def asks_for_code(checkpoint: Checkpoint) -> bool:
    """Whether the folder wants its own Python code run (`auto_map`, *.py). It never is."""
    if checkpoint.format == "gguf":
        return False
    return "auto_map" in checkpoint.metadata or any(checkpoint.path.glob("*.py"))


def tensor_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """One tensor and its place."""
    tensor = checkpoint.tensors[name]
    return {
        "name": name,
        "element": tensor.element.name,
        "shape": list(tensor.shape),
        "bytes": tensor.extent.nbytes,
        "file": tensor.extent.path.name,
        "offset": tensor.extent.offset,
    }


def _first(checkpoint: Checkpoint, *keys: str) -> Any:
    values = (checkpoint.metadata.get(key) for key in keys)
    return next((value for value in values if isinstance(value, str | int | float)), None)


def show(facts: dict[str, Any]) -> None:
    """Print the facts as tables."""
    console = output_console()
    table = Table("", Column(overflow="fold"), show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in _rows(facts):
        text = printable(str(value))
        table.add_row(label, text[:_SHOWN] if console.is_terminal else text)
    console.print(table)
    if "tensors" in facts:
        console.print(_tensor_table(facts["tensors"]))


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, object]]:
    yield "model", facts["name"] or Path(facts["path"]).name
    yield "format", facts["format"]
    yield "architecture", facts["architecture"]
    yield "parameters", f"{facts['parameters'] / 1e9:.3g} billion ({format_size(facts['bytes'])})"
    yield "context", facts["context_length"] or "not stated"
    for element, counts in facts["elements"].items():
        yield f"  {element}", f"{counts['tensors']} tensors, {format_size(counts['bytes'])}"
    yield "tokenizer", _tokenizer_line(facts)
    yield "chat template", _template_line(facts)
    yield "license", facts["license"] or "not stated"
    yield "remote code", "asked for, and never run" if facts["remote_code"] else "none"
    for file in facts["files"]:
        yield "file", f"{file['path']} ({format_size(file['bytes'])})"


def _tokenizer_line(facts: dict[str, Any]) -> str:
    if facts["tokenizer_error"] is not None:
        return f"unusable: {facts['tokenizer_error']}"
    return f"{facts['tokenizer']}, {facts['vocab_size']} tokens" if facts["tokenizer"] else "none: token ids only"


def _template_line(facts: dict[str, Any]) -> str:
    if not facts["chat_template"]:
        return "none"
    if facts["chat_template_error"] is not None:
        return f"refused by the sandbox: {facts['chat_template_error']}"
    return f"{facts['chat_template_characters']} characters, works in the sandbox"


def _tensor_table(tensors: list[dict[str, Any]]) -> Table:
    table = Table(Column("tensor", overflow="fold"), "type", "shape", "size", "offset", box=None)
    for tensor in tensors:
        shape = " x ".join(str(size) for size in tensor["shape"])
        table.add_row(
            printable(tensor["name"]), tensor["element"], shape, format_size(tensor["bytes"]), str(tensor["offset"])
        )
    return table
