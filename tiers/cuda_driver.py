"""What the CUDA driver itself says of cards, asked through ctypes. Importing torch to be told "none" would cost 200 MB."""

from __future__ import annotations

import ctypes
import sys
from typing import Final, NamedTuple

_LIBRARY: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_QUIET: Final = (34, 100)  # a stub of the driver, no card: nothing that a user has to mend


class Cards(NamedTuple):
    """How many cards the driver offers to this process; `error` is its code where it has cards and cannot start."""

    num_cards: int
    has_driver: bool = True
    error: int = 0


def find_cards() -> Cards:
    """Never raises: no driver, a broken one and an empty list of visible cards are all answers."""
    try:
        driver = ctypes.CDLL(_LIBRARY)
        code = int(driver.cuInit(0))
        count = ctypes.c_int(0)
        code = code or int(driver.cuDeviceGetCount(ctypes.byref(count)))
    except (OSError, AttributeError):
        return Cards(0, has_driver=False)
    if code:
        return Cards(0, has_driver=code != _QUIET[0], error=0 if code in _QUIET else code)
    return Cards(max(0, count.value))
