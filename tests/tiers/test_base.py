"""Handles and cancel tokens: what ends a wait, how soon, and with which words."""

from __future__ import annotations

import threading

import pytest

from offload.errors import Cancelled, StorageError
from offload.tiers.base import CancelToken, TransferHandle


def later(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_a_handle_ends_with_its_last_piece():
    handle = TransferHandle(pieces=2, nbytes=30)
    handle.complete(10)
    assert not handle.done()
    handle.complete(20)
    assert handle.done()
    handle.wait()


def test_completed_is_done_at_once():
    handle = TransferHandle.completed(7)
    assert handle.done() and handle.nbytes == 7 and handle.error is None
    handle.wait(timeout_s=0.0)


def test_the_first_error_is_kept_and_raised_only_when_all_pieces_have_ended():
    handle = TransferHandle(pieces=3, nbytes=3)
    handle.fail(StorageError("first"))
    handle.fail(StorageError("second"))
    assert not handle.done()
    with pytest.raises(StorageError, match="no progress"):
        handle.wait(timeout_s=0.01)
    handle.complete(1)
    assert str(handle.error) == "first"
    with pytest.raises(StorageError, match="first"):
        handle.wait()


def test_completion_on_another_thread_wakes_the_wait():
    handle = TransferHandle(pieces=1, nbytes=1)
    timer = later(0.02, lambda: handle.complete(1))
    handle.wait(timeout_s=10)
    timer.join()
    assert handle.done()


@pytest.mark.parametrize("before", [True, False])
def test_cancel_ends_the_wait(before):
    handle, token = TransferHandle(pieces=1, nbytes=1), CancelToken()
    timer = later(0.0 if before else 0.1, token.cancel)
    if before:
        timer.join()
    with pytest.raises(Cancelled):
        handle.wait(token, timeout_s=10)
    timer.join()
    assert not handle.done()


def test_the_time_out_restarts_on_progress():
    handle = TransferHandle(pieces=4, nbytes=40)
    timers = [later(0.15 * n, lambda: handle.complete(10)) for n in range(1, 5)]
    handle.wait(timeout_s=0.4)  # 0.6 s in all
    for timer in timers:
        timer.join()


def test_the_time_out_names_bytes_done_and_expected():
    handle = TransferHandle(pieces=2, nbytes=30)
    handle.complete(10)
    with pytest.raises(StorageError, match=r"0\.01 s with 10 of 30 bytes"):
        handle.wait(timeout_s=0.01)


def test_cancel_token():
    token = CancelToken()
    token.raise_if_cancelled()
    assert not token.wait(0.0) and not token.cancelled
    timer = later(0.02, token.cancel)
    assert token.wait(10) and token.cancelled
    timer.join()
    with pytest.raises(Cancelled):
        token.raise_if_cancelled()
