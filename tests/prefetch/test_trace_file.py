"""Traces survive a file, and nothing else gets in: every byte may be wrong."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import CheckpointError, StorageError
from offload.prefetch.routing import NOBODY, RoutingTrace
from offload.prefetch.synthetic import skewed
from offload.prefetch.trace_file import decode, encode, read_routing, write_routing


def full_trace(num_experts: int = 16) -> RoutingTrace:
    trace = skewed(40, 3, num_experts, 2)
    choices = trace.choices.copy()
    choices[0, 2] = NOBODY
    random = np.random.default_rng(1)
    foreseen = np.argsort(random.random((40, 2, 3, num_experts)), axis=-1)[..., :4].astype(np.int16)
    foreseen[:, 1, 0] = NOBODY
    return replace(
        trace, model="abc", origin="some text", choices=choices, foreseen=foreseen, fixed_bytes=77,
        passes=np.repeat(np.arange(10, dtype=np.int32), 4),
        banks=(0, 0, 1), expert_bytes=(5, 5, 6), slot_bytes=(8, 8, 9), layers=(1, 2, 4),
    )  # fmt: skip


@pytest.mark.parametrize("num_experts", [16, 255, 256, 1000])
def test_a_trace_comes_back_as_it_was(tmp_path: Path, num_experts: int) -> None:
    path, trace = tmp_path / "deep" / "a.trace", full_trace(num_experts)
    write_routing(path, trace)
    found = read_routing(path)
    for field in fields(RoutingTrace):
        assert np.array_equal(getattr(found, field.name), getattr(trace, field.name)), field.name
    write_routing(path, replace(trace, origin="again"))
    assert read_routing(path).origin == "again"
    assert [file.name for file in path.parent.iterdir()] == ["a.trace"]


def test_a_choice_costs_about_a_byte() -> None:
    trace = skewed(1000, 6, 32, 4)
    assert len(encode(trace)) < 1.1 * trace.choices.size + 1000


def test_nothing_but_a_trace_is_replaced(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF precious")
    for place in (model, tmp_path):
        with pytest.raises(StorageError, match="choose another place"):
            write_routing(place, full_trace())
    assert model.read_bytes() == b"GGUF precious"
    with pytest.raises(StorageError, match=r"No such file.*check the path"):
        read_routing(tmp_path / "missing")


def test_a_full_disk_leaves_the_trace_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.trace"
    write_routing(path, full_trace())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offload.writing.os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_routing(path, replace(full_trace(), origin="new"))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def refused(data: bytes, tmp_path: Path) -> str:
    path = tmp_path / "bad.trace"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_routing(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_is_never_believed(place: int, flip: int) -> None:
    data = bytearray(encode(full_trace()))
    data[place % len(data)] ^= flip
    with pytest.raises(Exception, match=r"."):
        decode(bytes(data))


@pytest.mark.parametrize("length", [0, 3, 8, 15, 16, 40, 600])
def test_a_file_that_ends_early_is_refused(length: int, tmp_path: Path) -> None:
    assert "record it anew with `offload trace record`" in refused(encode(full_trace())[:length], tmp_path)


def lying(change: Any, trace: RoutingTrace | None = None) -> bytes:
    """A file with a sound checksum whose header says something else."""
    data = encode(trace or full_trace())
    (length,) = struct.unpack_from("<I", data, 12)
    header = json.loads(data[16 : 16 + length])
    change(header)
    text = json.dumps(header).encode()
    body = data[:12] + struct.pack("<I", len(text)) + text + data[16 + length : -4]
    return body + struct.pack("<I", zlib.crc32(body))


def put(*path: str, value: Any) -> Any:
    def change(header: dict[str, Any]) -> None:
        for name in path[:-1]:
            header = header[name]
        header[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("num_experts", value=8), "expert 1[0-9] of 8"),
        (put("num_experts", value=0), "no size"),
        (put("num_experts", value=10**9), "no number from 0"),
        (put("num_experts", value=True), "no number from 0"),
        (put("layers", value=[1, 2]), "2 layers, but 3"),
        (put("layers", value=[2, 1, 4]), "out of order"),
        (put("layers", value=[1.5, 2, 4]), "no number"),
        (put("layers", value="abc"), "no list"),
        (put("expert_bytes", value=[0, 5, 5]), "no size"),
        (put("slot_bytes", value=[1] * 9), "3 layers, but 9"),
        (put("model", value="a\nb"), "no text"),
        (put("origin", value=7), "no text"),
        (put("arrays", "choices", "shape", value=[10**9, 10**9, 10**9]), "choices: .* in [0-9]+ bytes"),
        (put("arrays", "choices", "shape", value=[40, 3]), "2 dimensions"),
        (put("arrays", "choices", "shape", value=[41, 3, 2]), "its bytes are not"),
        (put("arrays", "choices", "shape", value=[40, 2, 3]), "choices of 2 layers"),
        (put("arrays", "choices", "type", value="<f8"), "<f8 of 3 dimensions"),
        (put("arrays", "choices", "nbytes", value=10**12), "no number from 0"),
        (put("arrays", "passes", "nbytes", value=0), "its bytes are not|in 0 bytes"),
        (put("arrays", "foreseen", "shape", value=[20, 4, 3, 4]), "foreseen of shape"),
        (put("arrays", value={}), "arrays"),
        (put("arrays", value=5), "no sense"),
        (lambda header: header.pop("banks"), "no sense"),
    ],
)
def test_a_header_that_lies_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    import re

    assert re.search(message, refused(lying(change), tmp_path))


def test_a_trace_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    trace = full_trace()
    twice, half, back = trace.choices.copy(), trace.choices.copy(), trace.passes.copy()
    twice[3, 1] = 4
    half[3, 1, 0] = NOBODY
    back[5] = 9
    for change, message in (
        ({"choices": twice}, "an expert twice"),
        ({"choices": half}, "fewer experts than others"),
        ({"passes": back}, "ascending"),
    ):
        assert message in refused(encode(replace(trace, **change)), tmp_path)


def test_sizes_beside_an_empty_dimension_are_checked_too(tmp_path: Path) -> None:
    bare = replace(full_trace(), foreseen=np.zeros((40, 1, 3, 0), np.int16))
    for shape in ([40, 1 << 40, 3, 0], [40, 1, 1 << 40, 0], [0, 4, 3, 2]):
        assert "foreseen of shape" in refused(lying(put("arrays", "foreseen", "shape", value=shape), bare), tmp_path)


def test_what_no_replay_could_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = full_trace()
    monkeypatch.setattr("offload.prefetch.trace_file.MAX_DECISIONS", 40 * 3 * trace.num_experts - 1)
    assert "more than can be replayed" in refused(encode(trace), tmp_path)


def test_what_people_read_of_a_trace_is_one_printable_line(tmp_path: Path) -> None:
    for origin in ("a\nb.py", "a\udcff.py", "\x1b[31m"):
        write_routing(tmp_path / "a.trace", replace(full_trace(), origin=origin))
        assert read_routing(tmp_path / "a.trace").origin.isprintable()


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    for place in (tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_routing(place)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(10**7))
    data = lying(put("arrays", "choices", "nbytes", value=len(bomb)))
    assert "routing trace" in refused(data, tmp_path)


def test_another_version_and_another_file_are_named(tmp_path: Path) -> None:
    data = bytearray(encode(full_trace()))
    data[8] = 1
    assert "version 1, this program reads 2" in refused(bytes(data), tmp_path)
    assert "not a routing trace" in refused(b"GGUF" + bytes(100), tmp_path)
