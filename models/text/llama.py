"""The llama.cpp library, made quiet. Knows nothing of tokenizers or samplers, which call it.

The library logs to stderr through one process-wide callback. It is replaced by one that says nothing: our own errors carry
what a user needs, and a full-screen chat must not be written over.
"""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any, Final

from offload.errors import BackendError

try:
    import llama_cpp as library
except (ImportError, OSError, RuntimeError) as error:
    raise BackendError(
        f"llama-cpp-python cannot be loaded ({error}): install it with `pip install llama-cpp-python`"
    ) from error


@library.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _silent(_level: int, _text: bytes, _user_data: Any) -> None:
    pass


library.llama_log_set(_silent, ctypes.c_void_p(0))

llama: Final[ModuleType] = library
"""The low-level API: one Python function per function of `llama.h`."""
