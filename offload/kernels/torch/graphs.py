"""Kernels that were launched once, recorded, and are launched again as one: CUDA graphs.

A graph holds addresses and numbers as they were when it was recorded; only memory is read anew. What it works on must
therefore stay where it is, and whatever a token changes must come from memory.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

import torch

from offload.tiers.device_errors import first_line

LENGTHS_KEPT: Final = 2
"""Of the cache, that graphs are kept for: where a conversation is, and where the one before it was."""
_LOG: Final = logging.getLogger("offload")


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Records what is asked of a device."""

    def record(self, work: Callable[[], None]) -> Graph:
        """Calls `work`, and has the device do nothing of it.

        Raises:
            RuntimeError: something in it cannot be recorded, or there is no memory.
        """
        ...

    def wait(self) -> None:
        """Until nothing is being replayed."""
        ...


class Graphs:
    """The graphs of a schedule, by piece and by the length of the cache that it looks at.

    A piece runs as it is the first time, since kernels are compiled and tensors made then; the second time it is recorded.
    One that cannot be recorded runs as it is for good. Called from one thread.

    Args:
        recorder: left out, all pieces always run as they are.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._lengths: OrderedDict[int, dict[str, Graph | None]] = OrderedDict()
        self._refused: set[str] = set()
        self._warned = False

    def run(self, piece: str, length: int, work: Callable[[], None]) -> None:
        """Does `work`, which must be the same for the same piece and length until `forget`."""
        if self._recorder is None or piece in self._refused:
            return work()
        graphs = self._of(length, self._recorder)
        if piece not in graphs:
            work()
            graphs[piece] = None
            return None
        graph = graphs[piece] or self._record(self._recorder, piece, work)
        if graph is None:
            return work()
        graphs[piece] = graph
        return graph.replay()

    def forget(self) -> None:
        """Something has changed that graphs hold."""
        if self._recorder is not None and self._lengths:
            self._recorder.wait()
        self._lengths.clear()
        self._refused.clear()

    def _of(self, length: int, recorder: Recorder) -> dict[str, Graph | None]:
        if length not in self._lengths:
            if len(self._lengths) == LENGTHS_KEPT:
                recorder.wait()
                self._lengths.popitem(last=False)
            self._lengths[length] = {}
        self._lengths.move_to_end(length)
        return self._lengths[length]

    def _record(self, recorder: Recorder, piece: str, work: Callable[[], None]) -> Graph | None:
        try:
            return recorder.record(work)
        except RuntimeError as error:  # a device that has failed fails again when the piece runs as it is
            self._refused.add(piece)
            if not self._warned:
                _LOG.warning(
                    "%s: a token's kernels cannot be recorded as a CUDA graph (%s) and are launched one by one, "
                    "which is slower; nothing else changes", piece, first_line(error),
                )  # fmt: skip
            self._warned = True
            return None


class CudaRecorder:
    """CUDA graphs, recorded on a stream of their own into one pool of memory.

    Graphs share the pool, whatever their order: no value passes from one to another through it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._keeper: Graph | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []

    def record(self, work: Callable[[], None]) -> Graph:
        if self._keeper is None:  # torch takes no pool again whose last graph has gone
            self._keeper = self._recorded(lambda: torch.zeros(1, device=self._device).zero_())
        return self._recorded(work)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def _recorded(self, work: Callable[[], object]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            try:
                # other threads ask about copies meanwhile, which "global" would not let them
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Takes stream and allocator out of recording. torch does only part of that, and its pool is of no use then."""
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError):  # which has done this where the recording was valid
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        self._failed.append(graph)  # the allocator may still ask it
        self._pool, self._keeper = torch.cuda.graph_pool_handle(), None


def recorder_for(device: torch.device) -> Recorder | None:
    """What the device has; other devices than CUDA's have nothing of the kind."""
    return CudaRecorder(device) if device.type == "cuda" else None
