"""The driver thread, and streams that hand its results to other threads.

One thread runs every forward pass, so kernels, KV cache and ring have one owner, and requests from several threads queue up.
A request is a job: it emits chunks and returns a completion. The consumer may be slower, cancel from any thread, or vanish.

Whoever waits for the thread may not be the thread, as a request's callback is, nor a forked child, where it does not exist.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Final, TypeVar

from offload.errors import ClosedError, UsageError
from offload.results import Chunk, Completion
from offload.tiers.base import CancelToken

T = TypeVar("T")
Job = Callable[[CancelToken, Callable[[Chunk], None]], Completion]
EXIT_S: Final = 10.0  # the longest that a request which does not heed its cancel holds up the interpreter's end


class Driver:
    """One named thread that runs jobs in order of submission.

    The thread is a daemon, since the interpreter waits for others before it asks anybody to stop. At its end, what is
    queued or runs is cancelled and waited for.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closed = self._ending = False
        self._cancels: set[CancelToken] = set()  # of what is queued or runs
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._jobs,), name="offload-driver", daemon=True)
        self._thread.start()
        weakref.finalize(
            self, self._jobs.put, None
        ).atexit = False  # the thread does not outlive a driver that is dropped
        _drivers.add(self)

    @property
    def inherited(self) -> bool:
        """Whether this process was forked from the one that has the thread."""
        return os.getpid() != self._process

    def submit(self, work: Callable[[], T], cancel: CancelToken | None = None) -> Future[T]:
        """Queues `work`, which heeds `cancel` if it is given one.

        Raises:
            ClosedError: the driver was shut down, or is another process's. UsageError: called from its thread.
        """
        self.check_process()
        self.check_thread()
        with self._lock:
            if self._closed:
                raise ClosedError("the engine is closed; load the model again")
            return self._put(work, cancel)

    def check_process(self) -> None:
        """
        Raises:
            ClosedError: the thread is in the process that this one was forked from.
        """
        if self.inherited:
            raise ClosedError(
                f"the engine belongs to process {self._process}, its threads do not come along into a forked one; "
                'load the model in the child, or start it with "spawn"'
            )

    def check_thread(self) -> None:
        """
        Raises:
            UsageError: called from the thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            raise UsageError(
                "the engine was called from a callback of a running request and would wait for itself; "
                "call it when the request has ended, or from another thread"
            )

    def stop(self) -> None:
        """Takes no more work and cancels what is queued or runs; returns at once."""
        with self._lock:
            self._closed = True
            cancels = list(self._cancels)
        for cancel in cancels:
            cancel.cancel()

    def close(self, last: Callable[[], None] | None = None, timeout_s: float | None = None) -> None:
        """Runs what is queued, then `last`, then ends the thread. Idempotent: a `last` is not run after the first call.

        Raises:
            UsageError: called from the thread. Whatever `last` raises.
        """
        self.check_thread()
        future: Future[None] | None = None
        with self._lock:
            self._closed = True
            if not self._ending:
                self._ending = True
                future = None if last is None else self._put(last, None)
                self._jobs.put(None)
        self._thread.join(timeout_s)
        if future is not None:
            future.result()

    def _put(self, work: Callable[[], T], cancel: CancelToken | None) -> Future[T]:
        future: Future[T] = Future()
        if cancel is not None:
            self._cancels.add(cancel)
        self._jobs.put(partial(_run, work, future, cancel, self._cancels))  # which must not keep the driver alive
        return future


def _run(work: Callable[[], T], future: Future[T], cancel: CancelToken | None, cancels: set[CancelToken]) -> None:
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
        del work, future  # the error knows this frame: a circle, and all that the work holds would stay in it
    else:
        future.set_result(result)
    finally:
        if cancel is not None:
            cancels.discard(cancel)


def _serve(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # with all that it holds, and not only when the next one comes


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


@atexit.register
def _end_with_the_interpreter() -> None:
    for driver in list(_drivers):
        if not driver.inherited:
            driver.stop()
            driver.close(timeout_s=EXIT_S)


class Stream(Iterator[Chunk]):
    """A running generation: iterate over its chunks, `cancel` it from any thread, ask for its `result`.

    Leaving the `with` block, or dropping the stream, cancels it.
    """

    def __init__(self, driver: Driver, job: Job) -> None:
        self._driver = driver
        self._cancel = CancelToken()
        self._chunks: SimpleQueue[Chunk | None] = SimpleQueue()
        cancel, chunks = self._cancel, self._chunks  # the job must not keep the stream alive: dropping it cancels

        def run() -> Completion:
            try:
                return job(cancel, chunks.put)
            finally:
                chunks.put(None)

        self._future = driver.submit(run, cancel)
        self._ended = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        chunk = self.next_chunk()
        if chunk is None:
            raise StopIteration
        return chunk

    def next_chunk(self) -> Chunk | None:
        """The next chunk, or None after the last.

        Raises:
            UsageError, ClosedError: as `result`. Whatever the generation raised.
        """
        if self._ended:
            return None
        self._check_caller()
        chunk = self._chunks.get()
        if chunk is None:
            self._ended = True
            self._future.result()
        return chunk

    def result(self) -> Completion:
        """Waits for the end and returns the whole answer; chunks not yet taken can still be iterated.

        Raises:
            UsageError: asked by a callback of a running request, which would wait for itself.
            ClosedError: asked in a forked process. Whatever the generation raised.
        """
        self._check_caller()
        return self._future.result()

    def cancel(self) -> None:
        """Asks the generation to stop; it ends within a tenth of a second with finish reason "cancelled"."""
        if not self._driver.inherited:
            self._cancel.cancel()

    def close(self) -> None:
        """Cancels and waits until the engine is free again. Errors of the generation are not raised here.

        Raises:
            UsageError: called by a callback of a running request; `cancel` does not wait.
        """
        if self._driver.inherited:
            return
        self._check_caller()
        self.cancel()
        self._future.exception()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.cancel()

    def _check_caller(self) -> None:
        self._driver.check_process()
        if not self._future.done():
            self._driver.check_thread()


async def iterate(stream: Stream) -> AsyncIterator[Chunk]:
    """The stream's chunks for asyncio; cancelling the task cancels the generation."""
    import asyncio

    try:
        while (chunk := await asyncio.to_thread(stream.next_chunk)) is not None:
            yield chunk
    finally:
        stream.cancel()
