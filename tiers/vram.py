"""The device tier: one arena of bytes on a torch device, filled from host memory. The only tier that imports torch.

CUDA copies run on a stream of their own, after the kernels that were queued before them; `torch:cpu` runs the same code
with a plain copy. Knows offsets, not what lies there.

Threads: the driver thread is its only user; handles may be waited for from any thread.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from offload.errors import AllocationError, StorageError
from offload.results import EdgeUse
from offload.tiers.base import POLL_S, TIMEOUT_S, CancelToken, Handle, TransferHandle
from offload.tiers.device_errors import allocating, device_errors
from offload.units import MIB, PAGE, align_up, format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatistics:
    """Bytes of the arena that are handed out, and the traffic into it (`busy_s`: host time spent starting copies)."""

    capacity_bytes: int
    allocated_bytes: int
    copies: EdgeUse


class DeviceTier:
    """An arena of exactly `capacity_bytes` on `device` ("cpu", "cuda:0", ...).

    Raises:
        AllocationError: the device has no such room.
    """

    def __init__(self, device: str, capacity_bytes: int) -> None:
        assert capacity_bytes > 0, capacity_bytes
        self.device = torch.device(device)
        self.capacity_bytes = capacity_bytes
        with allocating(self.device, capacity_bytes, "the model", "lower --vram"):
            self._arena = torch.empty(capacity_bytes, dtype=torch.uint8, device=self.device)
            self._stream = _new_stream(self.device) if self.device.type == "cuda" else None
        self._top = 0
        self._copied = 0
        self._copy_s = 0.0

    def allocate(self, nbytes: int) -> int:
        """Offset of the next `nbytes`, page-aligned. There is no way to give them back but `close`.

        Raises:
            AllocationError: the arena is full.
        """
        offset = self._top
        if offset + nbytes > self.capacity_bytes:
            raise AllocationError(
                f"device memory: {format_size(nbytes)} needed, {format_size(self.capacity_bytes - offset)} of "
                f"{format_size(self.capacity_bytes)} left; raise --vram",
                needed_bytes=nbytes,
                available_bytes=self.capacity_bytes - offset,
            )
        self._top = min(align_up(offset + nbytes, PAGE), self.capacity_bytes)
        return offset

    @device_errors
    def copy_in(self, source: memoryview, offset: int) -> Handle:
        """Starts copying `source` (writable, contiguous) to `offset`; it must not change before the handle has ended.

        Kernels that were started before see the old bytes. Kernels started after `wait` see the new ones.

        Raises:
            DeviceError: the device has failed.
        """
        start_s = time.perf_counter()
        target = self.view(offset, len(source))
        host = torch.frombuffer(source, dtype=torch.uint8)
        handle = self._copy(host, target)
        self._copied += len(source)
        self._copy_s += time.perf_counter() - start_s
        return handle

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes `[offset, offset + nbytes)` as uint8, without a copy."""
        assert 0 <= offset <= offset + nbytes <= self.capacity_bytes, (offset, nbytes, self.capacity_bytes)
        return self._arena[offset : offset + nbytes]

    def statistics(self) -> DeviceStatistics:
        return DeviceStatistics(
            capacity_bytes=self.capacity_bytes,
            allocated_bytes=self._top,
            copies=EdgeUse(bytes=self._copied, busy_s=self._copy_s),
        )

    def close(self) -> None:
        """Waits for copies in flight and frees the arena; idempotent. Views still held keep it alive."""
        if self._stream is not None:
            with suppress(RuntimeError):  # of a device that is gone: there is nothing to wait for
                self._stream.synchronize()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self.capacity_bytes = self._top = 0

    def _copy(self, host: torch.Tensor, target: torch.Tensor) -> Handle:
        if self._stream is None:
            target.copy_(host)
            return TransferHandle.completed(host.numel())
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(host, non_blocking=True)
            event = self._stream.record_event()
        return _DeviceHandle(self.device, host, event)


class _DeviceHandle:
    """A copy on a stream. Keeps the source alive until it has ended."""

    def __init__(self, device: torch.device, host: torch.Tensor, event: torch.cuda.Event) -> None:
        self.device = device
        self.nbytes = host.numel()
        self.error: Exception | None = None
        self._host: torch.Tensor | None = host
        self._event = event

    @device_errors
    def done(self) -> bool:
        if self._host is not None and self._event.query():  # type: ignore[no-untyped-call]
            self._host = None
        return self._host is None

    def wait(self, cancel: CancelToken | None = None, timeout_s: float = TIMEOUT_S) -> None:
        deadline, pause_s = time.monotonic() + timeout_s, 20e-6
        while not self.done():
            if cancel is not None:
                cancel.raise_if_cancelled()
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"device copy: 0 of {self.nbytes} bytes done within {timeout_s:g} s; the device hangs: start again"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S)


def measure_copies(device: str, nbytes: int = 64 * MIB, repetitions: int = 4) -> float:
    """Bytes per second of copies from pageable host memory to the device, which is what models are read into.

    Raises:
        AllocationError: the device has no such room.
    """
    tier = DeviceTier(device, nbytes)
    source = memoryview(bytearray(nbytes))
    try:
        tier.copy_in(source, 0).wait()  # the first one finds the device asleep
        start_s = time.perf_counter()
        for _ in range(repetitions):
            tier.copy_in(source, 0).wait()
        return repetitions * nbytes / (time.perf_counter() - start_s)
    finally:
        tier.close()


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
