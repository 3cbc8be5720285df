"""What goes wrong on a device, in this project's words. torch reports it as RuntimeErrors of several lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from offload.errors import AllocationError, DeviceError
from offload.units import format_size


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
        except RuntimeError as error:
            if is_refusal(error):
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()  # what torch keeps for later may be all that the next request lacks
                raise AllocationError(
                    f"{self.device}: out of memory ({first_line(error)}); another program may have taken it: close it and "
                    "ask again, or load with a lower --vram",
                    needed_bytes=0,
                ) from error
            if is_failure(error):
                raise _failed(self.device, error) from error
            raise

    return guarded


@contextmanager
def allocating(device: torch.device, nbytes: int, purpose: str, advice: str) -> Iterator[None]:
    """Where memory of a device is taken for good.

    Raises:
        AllocationError: there is none. DeviceError: the device fails.
    """
    try:
        yield
    except RuntimeError as error:
        if is_refusal(error):
            free = _free_bytes(device)
            known = "" if free is None else f", {format_size(free)} free"
            raise AllocationError(
                f"device memory: {device} refused {format_size(nbytes)} for {purpose}{known}; {advice}",
                needed_bytes=nbytes,
                available_bytes=free,
            ) from error
        if is_failure(error):
            raise _failed(device, error) from error
        raise


def is_refusal(error: RuntimeError) -> bool:
    """Whether torch reports that memory is lacking: its allocator for CUDA, CUDA itself, or the one for the CPU."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "DefaultCPUAllocator" in text


def _free_bytes(device: torch.device) -> int | None:
    """What the device says it has free, where one can be asked and answers."""
    free = None
    with suppress(RuntimeError):
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return free


def _failed(device: torch.device, error: RuntimeError) -> DeviceError:
    return DeviceError(
        f"{device}: the device failed ({first_line(error)}); nothing of a conversation is lost: load the "
        "model again, or use --device cpu"
    )


def is_failure(error: RuntimeError) -> bool:
    """Whether torch reports that the device, and not the caller, is to blame."""
    reported = getattr(torch, "AcceleratorError", None)  # torch 2.8 and later
    return (reported is not None and isinstance(error, reported)) or "CUDA error" in str(error)


def first_line(error: BaseException) -> str:
    """Of the message: what follows is advice on debugging CUDA."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
