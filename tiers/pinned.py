"""Host memory that a device's copy engine reads by itself: registered where it lies, once for each slab, to the byte.

Registering what we have allocated, instead of asking torch for pinned memory, costs no rounding to powers of two. Where a
system allows little of it (containers, Windows) a slab stays pageable: copies are slower, and nothing else changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import torch

from offload.tiers.ram import Slab
from offload.units import format_size

_LOG: Final = logging.getLogger("offload")


def pin(slab: Slab, device: torch.device) -> Callable[[], None] | None:
    """Registers a slab; returns what undoes it, to be called before the slab is closed, or None where it stays pageable."""
    if device.type != "cuda" or not slab.nbytes:
        return None
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(slab.address, slab.nbytes, 0))
    if code:
        _forget_error(device)
        _LOG.warning(
            "%s of host memory stay pageable: the system lets no more be pinned (CUDA error %d); copies to %s are slower",
            format_size(slab.nbytes), code, device,
        )  # fmt: skip
        return None

    def unpin() -> None:
        runtime.cudaHostUnregister(slab.address)

    return unpin


def _forget_error(device: torch.device) -> None:
    """The runtime keeps the last error until somebody asks for it, and would blame the next kernel."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)
