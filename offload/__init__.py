"""Run language models that do not fit: weights streamed across VRAM, RAM and NVMe, exact at any budget.

    import offload

    with offload.load("model.gguf", ram="3GiB") as engine:
        print(engine.generate("The capital of France is", max_tokens=16, temperature=0).text)

Names are resolved on first use, so that importing the package costs milliseconds and never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload.config import GenerationConfig as GenerationConfig
    from offload.config import LoadConfig as LoadConfig
    from offload.config import SamplingConfig as SamplingConfig
    from offload.engine import Engine as Engine
    from offload.engine import load as load
    from offload.errors import AllocationError as AllocationError
    from offload.errors import BackendError as BackendError
    from offload.errors import BudgetError as BudgetError
    from offload.errors import Cancelled as Cancelled
    from offload.errors import CheckpointError as CheckpointError
    from offload.errors import ClosedError as ClosedError
    from offload.errors import ContextError as ContextError
    from offload.errors import DeviceError as DeviceError
    from offload.errors import OffloadError as OffloadError
    from offload.errors import StorageError as StorageError
    from offload.errors import UnsupportedError as UnsupportedError
    from offload.errors import UsageError as UsageError
    from offload.results import Chunk as Chunk
    from offload.results import Completion as Completion

__version__ = "0.1.0"

_HOME = {
    "GenerationConfig": "config",
    "LoadConfig": "config",
    "SamplingConfig": "config",
    "Engine": "engine",
    "load": "engine",
    "AllocationError": "errors",
    "BackendError": "errors",
    "BudgetError": "errors",
    "Cancelled": "errors",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "ContextError": "errors",
    "DeviceError": "errors",
    "OffloadError": "errors",
    "StorageError": "errors",
    "UnsupportedError": "errors",
    "UsageError": "errors",
    "Chunk": "results",
    "Completion": "results",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'offload' has no attribute {name!r}")
    return getattr(import_module(f"offload.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
