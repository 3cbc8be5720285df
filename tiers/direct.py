"""Reads from disk straight into a device's memory, by NVIDIA's kvikio where it is installed; it is never imported otherwise.

In its mode "direct" (GPUDirect Storage) the disk writes into the card, in "compat" kvikio reads into host memory of its own
and copies from there. Knows extents and places on a device, not what lies there.

Threads: one caller; kvikio reads with threads of its own.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

from offload.blocks import Extent
from offload.errors import StorageError
from offload.tiers.base import TIMEOUT_S
from offload.tiers.checked import check_inside, check_unchanged
from offload.tiers.files import File
from offload.units import MIB

_LOG: Final = logging.getLogger("offload")
_IN_FLIGHT: Final = 4  # of whole matrices, each of which its threads share
_PAUSE_S: Final = 200e-6
_SETTINGS: Final = {
    "num_threads": 4,
    "bounce_buffer_size": 4 * MIB,  # of each thread, in compat mode; kvikio's own would take 16
    "auto_direct_io_read": True,  # in compat mode too: nothing may stay in the page cache
}
_KVIKIO_ERRORS: Final = (RuntimeError, OSError, ValueError, MemoryError)

Mode = Literal["direct", "compat"]


class Kvikio(NamedTuple):
    """The module, set up for the engine, and how it reads."""

    module: Any
    buffer: Any
    mode: Mode


class Opener(Protocol):
    """Whose files are read; `tiers.nvme.NvmeReader` is one."""

    def file(self, path: Path) -> File: ...


def load_kvikio(device: str) -> Kvikio | None:
    """kvikio as it can be used for the device, or None. Importing it takes memory: to be called before memory is planned."""
    if device == "cpu":
        return None
    try:
        module, defaults = import_module("kvikio"), import_module("kvikio.defaults")
        defaults.set(dict(_SETTINGS))
        mode: Mode = "compat" if defaults.is_compat_mode_preferred() or not _has_gds() else "direct"
        return Kvikio(module, import_module("kvikio.buffer"), mode)
    except ModuleNotFoundError:
        return None
    except (ImportError, AttributeError, KeyError, *_KVIKIO_ERRORS) as error:
        _LOG.info("kvikio cannot be used, weights reach the device through host memory: %s", _line(error))
        return None


def describe_kvikio() -> dict[str, str | None]:
    """Version and mode; None where it is missing or cannot be used."""
    found = load_kvikio("cuda")
    return (
        {"version": None, "mode": None} if found is None else {"version": found.module.__version__, "mode": found.mode}
    )


class DirectReader:
    """Reads extents into a device's memory, a few at a time.

    Args:
        opener: has the files open; they are read by their path, and checked to be the same still.
    """

    def __init__(self, kvikio: Kvikio, opener: Opener) -> None:
        self.mode = kvikio.mode
        self._kvikio = kvikio
        self._opener = opener
        self._handles: dict[Path, Any] = {}

    def read(self, wanted: Iterable[tuple[Extent, Any]]) -> None:
        """Fills each tensor (uint8, on the device) with the bytes of its extent; returns when all have arrived.

        Raises:
            StorageError: a read failed, came up short, or the file changed.
        """
        flights: deque[tuple[Extent, Any]] = deque()
        try:
            for extent, target in wanted:
                if len(flights) == _IN_FLIGHT:
                    self._land(*flights.popleft())
                flights.append((extent, self._start(extent, target)))
            while flights:
                self._land(*flights.popleft())
        finally:
            for _, future in flights:  # after a failure: they write into memory that may go
                _has_ended(future)

    def close(self) -> None:
        """Closes the files and frees kvikio's buffers. Idempotent."""
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()
        with suppress(*_KVIKIO_ERRORS):
            self._kvikio.buffer.bounce_buffer_free()

    def _start(self, extent: Extent, target: Any) -> Any:
        check_inside(self._opener.file(extent.path), extent)
        try:
            if extent.path not in self._handles:
                self._handles[extent.path] = self._kvikio.module.CuFile(str(extent.path), "r")
            return self._handles[extent.path].pread(target, extent.nbytes, extent.offset)
        except _KVIKIO_ERRORS as error:
            raise _failure(extent, _line(error)) from error

    def _land(self, extent: Extent, future: Any) -> None:
        try:
            if not _has_ended(future):
                raise _failure(extent, f"no answer within {TIMEOUT_S:g} s")
            count = int(future.get())
        except _KVIKIO_ERRORS as error:
            raise _failure(extent, _line(error)) from error
        finally:
            check_unchanged(self._opener.file(extent.path))
        if count != extent.nbytes:
            raise _failure(extent, f"it ended after {count}")


def _has_gds() -> bool:
    return bool(import_module("kvikio.cufile_driver").get("is_gds_available"))


def _has_ended(future: Any) -> bool:
    """Waits for it; False when the time for that is over."""
    deadline = time.monotonic() + TIMEOUT_S
    while not future.done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE_S)
    return True


def _failure(extent: Extent, reason: str) -> StorageError:
    return StorageError(
        f"{extent.path}: reading {extent.nbytes} bytes at offset {extent.offset} to the device by kvikio failed: {reason}; "
        "check the disk and the file, then load the model again",
        path=str(extent.path),
        offset=extent.offset,
    )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
