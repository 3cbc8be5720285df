"""What goes wrong on a device, in this project's words. torch reports it as RuntimeErrors of several lines."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from offload.errors import AllocationError, DeviceError


class OnDevice(Protocol):
    """What has a device."""

    @property
    def device(self) -> torch.device: ...


Self = TypeVar("Self", bound=OnDevice)
P = ParamSpec("P")
R = TypeVar("R")


def device_errors(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """A method that raises `AllocationError` when the device is out of memory, and `DeviceError` when it fails."""

    @wraps(method)
    def guarded(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what torch keeps for later may be all that the next request lacks
            raise AllocationError(
                f"{self.device}: out of memory ({first_line(error)}); another program may have taken it: close it and ask "
                "again, or load with a lower --vram",
                needed_bytes=0,
            ) from error
        except RuntimeError as error:
            if not is_failure(error):
                raise
            raise DeviceError(
                f"{self.device}: the device failed ({first_line(error)}); nothing of a conversation is lost: load the "
                "model again, or use --device cpu"
            ) from error

    return guarded


def is_failure(error: RuntimeError) -> bool:
    """Whether torch reports that the device, and not the caller, is to blame."""
    reported = getattr(torch, "AcceleratorError", None)  # torch 2.8 and later
    return (reported is not None and isinstance(error, reported)) or "CUDA error" in str(error)


def first_line(error: BaseException) -> str:
    """Of the message: what follows is advice on debugging CUDA."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
