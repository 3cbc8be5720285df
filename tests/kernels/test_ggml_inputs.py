"""What the graphs of a micro-batch read: every query sees its window and no more, in as many keys as a bucket has."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.config import KV_BUCKET
from offload.kernels.batch import MicroBatch
from offload.kernels.ggml.inputs import BatchInputs, bucket
from offload.units import align_up

WINDOWS = st.none() | st.integers(1, 700)


@given(st.integers(1, 5000), st.integers(1, 5000))
@example(KV_BUCKET, 2 * KV_BUCKET)
def test_a_bucket_is_the_least_that_holds_the_keys_and_never_exceeds_the_context(length: int, ctx: int) -> None:
    room = align_up(max(length, ctx), KV_BUCKET)
    chosen = bucket(length, room)
    assert chosen % KV_BUCKET == 0
    assert chosen - KV_BUCKET < length <= chosen <= room
    assert chosen <= bucket(length + 1, room + KV_BUCKET) <= chosen + KV_BUCKET


@settings(max_examples=60)
@given(st.integers(0, 600), st.integers(1, 40), st.lists(WINDOWS, min_size=1, max_size=3, unique=True))
def test_a_query_sees_itself_and_the_keys_of_its_window_before_it(
    start: int, tokens: int, windows: list[int | None]
) -> None:
    batch = MicroBatch(start, tokens)
    inputs = BatchInputs(batch, bucket(batch.kv_length, 1024), windows)
    assert list(inputs.masks) == windows
    for window, mask in inputs.masks.items():
        assert mask.shape == (tokens, inputs.kv_length) and mask.dtype == np.float16 and mask.flags.c_contiguous
        seen = mask == 0
        assert np.isneginf(mask[~seen]).all()
        for position, row in enumerate(seen, start):
            visible = np.flatnonzero(row)
            assert visible[-1] == position
            assert len(visible) == visible[-1] - visible[0] + 1 == min(position + 1, window or position + 1)


@pytest.mark.parametrize(("outputs", "stored"), [((), [0]), ((2,), [2]), ((3, 0), [3, 0])])
def test_arrays_have_the_types_that_kernels_read_and_lie_where_they_say(
    outputs: tuple[int, ...], stored: list[int]
) -> None:
    inputs = BatchInputs(MicroBatch(300, 4, outputs), 512, (None, 3))
    kinds = {"positions": ctypes.c_int32, "rows": ctypes.c_int64, "outputs": ctypes.c_int32}
    lengths = {"positions": 4, "rows": 4, "outputs": len(stored)}
    read = {name: list((kinds[name] * lengths[name]).from_address(inputs.addresses[name])) for name in kinds}
    assert read == {"positions": [300, 301, 302, 303], "rows": [300, 301, 302, 303], "outputs": stored}
    for window, mask in inputs.masks.items():
        raw = ctypes.string_at(inputs.mask_addresses[window], mask.nbytes)
        assert np.array_equal(np.frombuffer(raw, np.float16).reshape(mask.shape), mask)
