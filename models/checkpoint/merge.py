"""The tensors of a checkpoint in several files. Knows neither format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from offload.errors import CheckpointError
from offload.models.checkpoint.base import TensorInfo
from offload.models.checkpoint.reader import quote


def merge_tensors(parts: Iterable[tuple[Path, Mapping[str, TensorInfo]]]) -> dict[str, TensorInfo]:
    """All tensors by name.

    Raises:
        CheckpointError: a name stands in two files.
    """
    tensors: dict[str, TensorInfo] = {}
    for path, found in parts:
        for name, info in found.items():
            if name in tensors:
                message = f"{path}: tensor {quote(name)} is also in {tensors[name].extent.path.name}"
                raise CheckpointError(message, path=str(path), tensor=name)
            tensors[name] = info
    return tensors
