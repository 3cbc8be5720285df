"""The driver thread, and streams that hand its results to other threads.

One thread runs every forward pass, so kernels, KV cache and ring have one owner, and requests from several threads queue up.
A request is a job: it emits chunks and returns a completion. The consumer may be slower, cancel from any thread, or vanish.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

from offload.errors import ClosedError
from offload.results import Chunk, Completion
from offload.tiers.base import CancelToken

T = TypeVar("T")
Job = Callable[[CancelToken, Callable[[Chunk], None]], Completion]


class Driver:
    """One named thread that runs jobs in order of submission."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="offload-driver")
        self._closed = False

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queues `work`.

        Raises:
            ClosedError: the driver was shut down.
        """
        if self._closed:
            raise ClosedError("the engine is closed; load the model again")
        return self._pool.submit(work)

    def close(self) -> None:
        """Runs what is queued, then ends the thread. Idempotent."""
        self._closed = True
        self._pool.shutdown(wait=True)


class Stream(Iterator[Chunk]):
    """A running generation: iterate over its chunks, `cancel` it from any thread, ask for its `result`.

    Leaving the `with` block, or dropping the stream, cancels it.
    """

    def __init__(self, driver: Driver, job: Job) -> None:
        self._cancel = CancelToken()
        self._chunks: SimpleQueue[Chunk | None] = SimpleQueue()
        cancel, chunks = self._cancel, self._chunks  # the job must not keep the stream alive: dropping it cancels

        def run() -> Completion:
            try:
                return job(cancel, chunks.put)
            finally:
                chunks.put(None)

        self._future = driver.submit(run)
        self._ended = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        chunk = self.next_chunk()
        if chunk is None:
            raise StopIteration
        return chunk

    def next_chunk(self) -> Chunk | None:
        """The next chunk, or None after the last. Raises what the generation raised."""
        if self._ended:
            return None
        chunk = self._chunks.get()
        if chunk is None:
            self._ended = True
            self._future.result()
        return chunk

    def result(self) -> Completion:
        """Waits for the end and returns the whole answer; chunks not yet taken can still be iterated."""
        return self._future.result()

    def cancel(self) -> None:
        """Asks the generation to stop; it ends within a tenth of a second with finish reason "cancelled"."""
        self._cancel.cancel()

    def close(self) -> None:
        """Cancels and waits until the engine is free again. Errors of the generation are not raised here."""
        self.cancel()
        self._future.exception()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._cancel.cancel()


async def iterate(stream: Stream) -> AsyncIterator[Chunk]:
    """The stream's chunks for asyncio; cancelling the task cancels the generation."""
    import asyncio

    try:
        while (chunk := await asyncio.to_thread(stream.next_chunk)) is not None:
            yield chunk
    finally:
        stream.cancel()
