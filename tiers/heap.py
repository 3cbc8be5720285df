"""The C library's heap, which keeps what is freed for its next allocation, and gives it to the system when asked to."""

from __future__ import annotations

import ctypes
import sys
from functools import cache


@cache
def can_trim_heap() -> bool:
    """Whether freed memory can be made to leave the process: glibc can."""
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")


def trim_heap() -> None:
    """Gives freed memory back to the system, in a few milliseconds. Does nothing where that is not possible."""
    if can_trim_heap():
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
