"""The device tier: one arena of bytes on a torch device, filled from host memory. The only tier that imports torch.

CUDA copies run on a stream of their own, after the kernels that were queued before them; `torch:cpu` runs the same code
with a plain copy. Knows offsets, not what lies there.

Threads: the driver thread is its only user; handles may be waited for from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from offload.errors import AllocationError, StorageError
from offload.results import EdgeUse
from offload.tiers.base import POLL_S, TIMEOUT_S, CancelToken, Handle, TransferHandle
from offload.tiers.device_errors import allocating, device_errors
from offload.units import PAGE, align_up, format_size


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
        return self.copy_parts([(source, offset)])

    @device_errors
    def copy_parts(self, parts: Sequence[tuple[memoryview, int]]) -> Handle:
        """As `copy_in`, of several sources that are one transfer."""
        start_s = time.perf_counter()
        handle = self._copy(
            [(torch.frombuffer(source, dtype=torch.uint8), self.view(offset, len(source))) for source, offset in parts]
        )
        self._copied += handle.nbytes
        self._copy_s += time.perf_counter() - start_s
        return handle

    @device_errors
    def order(self, handle: Handle) -> None:
        """Kernels that are started from now on see the bytes of one of this tier's copies; waits for nothing itself."""
        if isinstance(handle, _DeviceHandle):
            torch.cuda.current_stream(self.device).wait_event(handle.event)

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

    def drain(self) -> None:
        """Waits for copies in flight: their sources may go afterwards."""
        if self._stream is not None:
            with suppress(RuntimeError):  # of a device that is gone: there is nothing to wait for
                self._stream.synchronize()

    def close(self) -> None:
        """Waits for copies in flight and frees the arena; idempotent. Views still held keep it alive."""
        self.drain()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self.capacity_bytes = self._top = 0

    def _copy(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Handle:
        sources = [host for host, _ in copies]
        if self._stream is None:
            for host, target in copies:
                target.copy_(host)
            return TransferHandle.completed(sum(host.numel() for host in sources))
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for host, target in copies:
                target.copy_(host, non_blocking=True)
            event = self._stream.record_event()
        return _DeviceHandle(self.device, sources, event)


class _DeviceHandle:
    """Copies on a stream. Keeps their sources alive until they have ended."""

    def __init__(self, device: torch.device, sources: Sequence[torch.Tensor], event: torch.cuda.Event) -> None:
        self.device = device
        self.nbytes = sum(host.numel() for host in sources)
        self.error: Exception | None = None
        self.event = event
        self._sources: Sequence[torch.Tensor] | None = sources

    @device_errors
    def done(self) -> bool:
        if self._sources is not None and self.event.query():  # type: ignore[no-untyped-call]
            self._sources = None
        return self._sources is None

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


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
