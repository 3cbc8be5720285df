"""The public names: all there, nothing else, cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import offload

PUBLIC = {
    "BudgetError",
    "Cancelled",
    "CheckpointError",
    "Chunk",
    "Completion",
    "Engine",
    "GenerationConfig",
    "LoadConfig",
    "OffloadError",
    "SamplingConfig",
    "AllocationError",
    "BackendError",
    "ClosedError",
    "ContextError",
    "DeviceError",
    "StorageError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "load",
}


def test_the_public_names_are_these() -> None:
    assert set(offload.__all__) == PUBLIC
    assert dir(offload) == sorted(offload.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_name_resolves_and_has_a_docstring(name: str) -> None:
    assert getattr(offload, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        offload.lod  # noqa: B018


def test_type_checkers_are_told_the_same_names() -> None:
    tree = ast.parse(Path(offload.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.asname for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == PUBLIC - {"__version__"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "llama_cpp", "transformers", "rich", "typer", "offload.engine")
    script = f"import sys, offload; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
