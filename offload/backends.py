"""Which place holds a model: host RAM, computed by ggml, or a torch device."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from offload.config import LoadConfig
from offload.device_place import DevicePlace
from offload.host_place import HostPlace
from offload.opening import Opened
from offload.places import Place

if TYPE_CHECKING:  # torch costs 200 MB of memory: it is imported when a torch device is asked for, and only then
    pass


def make_place(opened: Opened, config: LoadConfig, stack: ExitStack) -> Place:
    """The place for the configured device; what it makes is freed with `stack`."""
    return HostPlace(opened, config, stack) if opened.device is None else DevicePlace(opened, config, stack)
