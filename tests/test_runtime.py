"""The driver's thread and streams over it: nothing is lost on a slow consumer, and whoever goes away cancels."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint

import offload
from offload.engine import Engine
from offload.errors import ClosedError, StorageError, UsageError
from offload.results import Chunk, Completion
from offload.runtime import Driver, Stream, iterate
from offload.tiers.base import CancelToken

CANCELLED, DONE = cast(Completion, "cancelled"), cast(Completion, "done")  # streams do not look at them
PATIENCE_S = 20.0  # how long a broken cancel is waited for


class Endless:
    """A job that emits one chunk and goes on until it is cancelled."""

    def __init__(self) -> None:
        self.running, self.was_cancelled = threading.Event(), False

    def __call__(self, cancel: CancelToken, emit: Callable[[Chunk], None]) -> Completion:
        emit(Chunk(text="a", tokens=(1,)))
        self.running.set()
        self.was_cancelled = cancel.wait(PATIENCE_S)
        emit(Chunk(text="b", tokens=(2,)))
        return CANCELLED


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    made.close()


@given(st.lists(st.text(max_size=3), max_size=30), st.integers(0, 30), st.booleans())
def test_a_slow_consumer_gets_every_chunk_in_order_and_then_the_end_or_the_error(
    texts: list[str], taken: int, fails: bool
) -> None:
    driver, chunks = Driver(), [Chunk(text=text, tokens=(number,)) for number, text in enumerate(texts)]

    def job(_: CancelToken, emit: Callable[[Chunk], None]) -> Completion:
        for chunk in chunks:
            emit(chunk)
        if fails:
            raise StorageError("the disk is gone")
        return DONE

    stream = Stream(driver, job)
    seen = [stream.next_chunk() for _ in range(min(taken, len(chunks)))]
    driver.close()  # the job is over, whatever is left in the stream
    outcome = pytest.raises(StorageError, match="gone") if fails else nullcontext()
    with outcome:
        for chunk in stream:
            seen.append(chunk)  # noqa: PERF402 - the error must not lose them
    assert seen == chunks
    with outcome:
        assert stream.result() is DONE
    stream.close()
    assert stream.next_chunk() is None


def test_a_stream_that_is_dropped_or_left_frees_the_driver(driver: Driver) -> None:
    job = Endless()
    stream = Stream(driver, job)
    assert next(stream).text == "a"
    del stream
    gc.collect()
    assert driver.submit(lambda: job.was_cancelled).result(), "the job must not keep its stream alive"
    with Stream(driver, job := Endless()):
        assert job.running.wait(PATIENCE_S)
    assert job.was_cancelled and driver.submit(lambda: True).result()


def test_another_thread_cancels_a_consumer_that_waits(driver: Driver) -> None:
    job = Endless()
    stream, seen = Stream(driver, job), list[str]()
    consumer = threading.Thread(target=lambda: seen.extend(chunk.text for chunk in stream))
    consumer.start()
    assert job.running.wait(PATIENCE_S)
    stream.cancel()
    consumer.join(PATIENCE_S)
    assert job.was_cancelled and seen == ["a", "b"]
    assert stream.result() is CANCELLED


def test_a_cancelled_task_of_asyncio_cancels_what_it_waits_for(driver: Driver) -> None:
    job = Endless()
    stream = Stream(driver, job)

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        async for chunk in iterate(stream):
            assert chunk.text == "a"
            asyncio.get_running_loop().call_soon(task.cancel)  # hits the wait for the next chunk

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert stream.result() is CANCELLED and job.was_cancelled


def test_jobs_run_in_order_on_one_thread_and_closing_runs_what_is_queued() -> None:
    driver, go, ran = Driver(), threading.Event(), list[tuple[int, int]]()
    driver.submit(lambda: go.wait(PATIENCE_S))
    for number in range(20):
        driver.submit(lambda number=number: ran.append((number, threading.get_ident())))
    closer = threading.Thread(target=driver.close)
    closer.start()
    go.set()
    closer.join(PATIENCE_S)
    assert [number for number, _ in ran] == list(range(20)) and len({thread for _, thread in ran}) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("offload-driver")]
    with pytest.raises(ClosedError, match="load the model again"):
        driver.submit(lambda: None)
    driver.close()


def test_closing_an_engine_while_a_request_runs_waits_for_it_and_refuses_the_queue(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path)
    threads = threading.active_count()
    engine = offload.load(model, ctx=64, ram="minimum")
    started, go = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        started.set()
        assert go.wait(PATIENCE_S)

    running = engine.stream([1, 2, 3], max_tokens=4, temperature=0, ignore_eos=True, on_prefill=hold)
    queued = engine.stream([1, 2, 3], max_tokens=4)
    assert started.wait(PATIENCE_S)
    closer = threading.Thread(target=engine.close)
    closer.start()
    while engine._runner is not None:
        closer.join(0.01)
    assert closer.is_alive(), "memory must not go while kernels use it"
    go.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert len([running.next_chunk() for _ in range(4)]) == 4
    with pytest.raises(ClosedError):
        queued.result()
    assert threading.active_count() == threads


def test_a_request_that_runs_while_the_engine_closes_keeps_its_result(demo: Path) -> None:
    engine = offload.load(demo, ctx=64)
    running, go_on = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        running.set()
        go_on.wait(30)

    stream = engine.stream([1, 2, 3], max_tokens=4, temperature=0, ignore_eos=True, on_prefill=hold)
    running.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine._runner is not None:
        time.sleep(0.005)
    go_on.set()
    assert len(stream.result().tokens) == 4
    closing.join()


def tries(*calls: Callable[[], object]) -> list[Exception | None]:
    """What each call raised."""
    errors: list[Exception | None] = []
    for call in calls:
        try:
            call()
        except Exception as error:
            errors.append(error)
        else:
            errors.append(None)
    return errors


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with offload.load(tiny_checkpoint("llama", tmp_path), ctx=64, ram="minimum") as engine:
        yield engine


def test_a_callback_of_a_request_that_waits_for_it_is_refused(engine: Engine) -> None:
    errors: list[Exception | None] = []
    made, streams = threading.Event(), list[Stream]()

    def ask(done: int, total: int) -> None:
        if not errors:
            assert made.wait(PATIENCE_S)
            (own,) = streams
            errors.extend(
                tries(
                    lambda: engine.generate([1, 2], max_tokens=1),
                    lambda: engine.logits([1, 2]),
                    lambda: engine.stream([1, 2]),
                    engine.close,
                    own.result,
                    own.next_chunk,
                    own.close,
                )
            )

    streams.append(engine.stream([1, 2, 3], max_tokens=2, ignore_eos=True, on_prefill=ask))
    made.set()
    watch = threading.Thread(target=streams[0].result, daemon=True)
    watch.start()
    watch.join(PATIENCE_S)
    assert [type(error) for error in errors] == [UsageError] * 7
    assert all("callback of a running request" in str(error) for error in errors)
    assert streams[0].result().finish_reason == "length"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_is_told_so_and_leaves_the_parents_engine_alone(engine: Engine) -> None:
    stream = engine.stream([1, 2, 3], max_tokens=2, ignore_eos=True)
    calls = (
        lambda: engine.generate([1, 2], max_tokens=1),
        lambda: engine.logits([1, 2]),
        lambda: engine.tokenize("a"),
        engine.statistics,
        stream.result,
        stream.next_chunk,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of newer Pythons, which warn of a fork beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE_S))  # ends a child that hangs
            errors = tries(*calls)
            told = all(isinstance(error, ClosedError) and "forked" in str(error) for error in errors)
            quiet = tries(stream.cancel, stream.close, engine.close, lambda: engine.__exit__(None, ValueError(), None))
            code = 0 if told and quiet == [None] * 4 else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(stream.result().tokens) == len(engine.generate([1, 2, 3], max_tokens=2, ignore_eos=True).tokens) == 2


def test_an_error_that_leaves_the_block_cancels_what_runs(tmp_path: Path) -> None:
    model, job, queued = tiny_checkpoint("llama", tmp_path), Endless(), list[Stream]()

    def fail() -> None:
        with offload.load(model, ctx=64, ram="minimum") as engine:
            queued.extend((Stream(engine._driver, job), engine.stream([1, 2, 3], max_tokens=4)))
            assert job.running.wait(PATIENCE_S)
            raise KeyError("a mistake")

    with pytest.raises(KeyError):
        fail()
    assert job.was_cancelled
    with pytest.raises(ClosedError):
        queued[1].result()


def test_the_end_of_the_interpreter_cancels_what_runs() -> None:
    program = f"""
import threading
from offload.runtime import Driver, Stream

running = threading.Event()

def job(cancel, emit):
    running.set()
    print("cancelled" if cancel.wait({PATIENCE_S}) else "waited for")

driver = Driver()
stream = Stream(driver, job)
running.wait()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert (run.stdout, run.stderr) == ("cancelled\n", "")


def test_a_driver_that_is_dropped_ends_its_thread() -> None:
    driver = Driver()
    thread = driver._thread
    assert driver.submit(lambda: 1).result() == 1
    del driver
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_an_error_holds_nothing_of_the_work_that_raised_it(driver: Driver) -> None:
    class Held:
        pass

    def fail(held: Held) -> None:
        raise ValueError("no")

    held = Held()
    alive = weakref.ref(held)
    gc.disable()
    try:
        future = driver.submit(lambda held=held: fail(held))
        assert isinstance(future.exception(), ValueError)
        del future, held
        assert driver.submit(lambda: True).result()  # the thread has let go of the work before
        assert alive() is None
    finally:
        gc.enable()
