"""Every hostile file ends in one CheckpointError that says what is wrong, within a second and 64 MB."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from support import hostile
from support.headers import ARRAY, F32, STRING, U8, Gguf, array, entry, key, safetensors, string, tensor

from offload.errors import CheckpointError
from offload.models.checkpoint import Checkpoint, open_checkpoint
from offload.units import MIB

CASES = [
    *(pytest.param(".gguf", *case, id=f"gguf: {name}") for name, case in hostile.GGUF.items()),
    *(pytest.param(".safetensors", *case, id=f"safetensors: {name}") for name, case in hostile.SAFETENSORS.items()),
]


def write(folder: Path, suffix: str, data: bytes, *, size: int | None = None) -> Path:
    path = folder / f"model{suffix}"
    path.write_bytes(data)
    if size is not None:
        with path.open("r+b") as file:
            file.truncate(size)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return path


def open_in_bounds(path: Path) -> Checkpoint | CheckpointError:
    """Opened twice: once against the clock, once against the memory (tracing is too slow to time)."""

    def attempt() -> Checkpoint | CheckpointError:
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            return error

    started = time.process_time()
    attempt()
    seconds = time.process_time() - started
    tracemalloc.start()
    try:
        result = attempt()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 1, f"{seconds:.2f} s"
    assert peak < 64 * MIB, f"{peak / MIB:.1f} MiB"
    return result


@pytest.mark.parametrize(("suffix", "data", "expected"), CASES)
def test_refused_with_the_reason(tmp_path: Path, suffix: str, data: bytes, expected: str) -> None:
    path = write(tmp_path, suffix, data)
    result = open_in_bounds(path)
    assert isinstance(result, CheckpointError)
    if suffix != ".gguf" or data[:4] == b"GGUF":
        assert expected in str(result)
    assert str(path) in str(result)
    assert result.path == str(path)
    assert "\n" not in str(result)
    assert len(str(result)) < 600 + len(str(path))


def test_the_error_carries_the_tensor(tmp_path: Path) -> None:
    data, _ = hostile.GGUF["data cut short"]
    with pytest.raises(CheckpointError) as gguf:
        open_checkpoint(write(tmp_path, ".gguf", data))
    data, _ = hostile.SAFETENSORS["size does not match"]
    with pytest.raises(CheckpointError) as safe:
        open_checkpoint(write(tmp_path, ".safetensors", data))
    assert gguf.value.tensor == safe.value.tensor == "t"


GGUF_SEED = Gguf(
    keys=(
        key("general.architecture", STRING, "llama"),
        array("tokens", STRING, ["a", "bc", ""]),
        array("scores", F32, [0.5, 1.5]),
        key("general.alignment", 4, 32),
    ),
    tensors=(tensor("t", [8, 2]), tensor("u", [32], 2, 64)),
    data=bytes(64 + 18),
).build()
SAFETENSORS_SEED = safetensors({"t": entry("BF16", [4, 2], 0, 16), "u": entry("F32", [2], 16, 24)}, bytes(24))


@pytest.mark.parametrize(("suffix", "seed"), [(".gguf", GGUF_SEED), (".safetensors", SAFETENSORS_SEED)])
def test_truncated_at_every_byte(tmp_path: Path, suffix: str, seed: bytes) -> None:
    open_checkpoint(write(tmp_path, suffix, seed))
    for length in range(len(seed)):
        with pytest.raises(CheckpointError):
            open_checkpoint(write(tmp_path, suffix, seed[:length]))


def _long(code: int, count: int) -> bytes:
    """Head of a GGUF whose only other key is an array; the file is then extended with zeros."""
    head = string("a.b") + struct.pack("<IIQ", ARRAY, code, count)
    return Gguf(keys=(key("general.architecture", STRING, "llama"), head), alignment=1).build()


LARGE = {
    "3 million empty strings": (".gguf", _long(STRING, 3_000_000), 40 * MIB, CheckpointError),
    "2.6 million empty strings": (".gguf", _long(STRING, 2_600_000), 40 * MIB, Checkpoint),
    "23 MiB of numbers": (".gguf", _long(U8, 23 * MIB), 40 * MIB, Checkpoint),
    "31 MiB of numbers": (".gguf", _long(U8, 31 * MIB), 40 * MIB, CheckpointError),
    "4 GiB of numbers": (".gguf", _long(U8, 4096 * MIB), 5000 * MIB, CheckpointError),
    "an empty array of arrays, a million times": (".gguf", _long(ARRAY, 1_000_000), 40 * MIB, CheckpointError),
    "a string of 5 MiB": (
        ".gguf",
        Gguf(
            keys=(
                key("general.architecture", STRING, "llama"),
                key("a.b", STRING, "\U0001f600".encode() + bytes(5 * MIB)),
            )
        ).build(),
        None,
        Checkpoint,
    ),
    "a string of 12 MiB": (
        ".gguf",
        Gguf(keys=(key("general.architecture", STRING, "llama"), key("a.b", STRING, bytes(12 * MIB)))).build(),
        None,
        CheckpointError,
    ),
    "35,000 tensors": (
        ".gguf",
        Gguf(
            tensors=tuple(tensor(f"tensor number {i}", [1], 0, 32 * i) for i in range(35_000)), data=bytes(35_000 * 32)
        ).build(),
        None,
        Checkpoint,
    ),
    "80,000 tensors": (
        ".gguf",
        Gguf(tensors=tuple(tensor(f"{i}", [1], 0, 32 * i) for i in range(80_000)), data=bytes(80_000 * 32)).build(),
        None,
        CheckpointError,
    ),
    "400 tensors with names of 64 KiB": (
        ".gguf",
        Gguf(
            tensors=tuple(tensor(f"\U0001f600{i:0>65000}", [1], 0, 32 * i) for i in range(400)), data=bytes(400 * 32)
        ).build(),
        None,
        CheckpointError,
    ),
    "50,000 keys": (
        ".gguf",
        Gguf(keys=tuple(key(f"{i}", U8, 0) for i in range(50_000))).build(),
        None,
        CheckpointError,
    ),
    "100,000 keys": (
        ".gguf",
        Gguf(keys=tuple(key(f"{i}", U8, 0) for i in range(100_000))).build(),
        None,
        CheckpointError,
    ),
    "17,000 tensors in JSON": (
        ".safetensors",
        safetensors({f"tensor number {i}": entry("F32", [1], 4 * i, 4 * i + 4) for i in range(17_000)}, bytes(68_000)),
        None,
        Checkpoint,
    ),
    "30,000 tensors in JSON": (
        ".safetensors",
        safetensors({f"{i}": entry("F32", [1], 4 * i, 4 * i + 4) for i in range(30_000)}, bytes(120_000)),
        None,
        CheckpointError,
    ),
    "99,000 empty lists": (".safetensors", safetensors(b'{"a":[' + b"[]," * 99_000 + b"[]]}"), None, CheckpointError),
    "3 million commas": (".safetensors", safetensors(b'{"a":[' + b"0," * 3_000_000 + b"0]}"), None, CheckpointError),
    "149,000 keys": (
        ".safetensors",
        safetensors(b"{" + b",".join(b'"%045d":0' % i for i in range(149_000)) + b"}"),
        None,
        CheckpointError,
    ),
    "8 MiB of text": (".safetensors", safetensors(b'{"a":"' + b"x" * (8 * MIB - 8) + b'"}'), None, CheckpointError),
    "8 MiB of escapes": (
        ".safetensors",
        safetensors(b'{"a":"' + b"\\\\" * (4 * MIB - 8) + b'"}'),
        None,
        CheckpointError,
    ),
    "8 MiB of quotes": (".safetensors", safetensors(b"{" + b'"' * (8 * MIB - 8) + b"}"), None, CheckpointError),
    "3 MiB with a rare character": (
        ".safetensors",
        safetensors(b'{"a":"\xf0\x9f\x98\x80' + b"x" * (3 * MIB) + b'"}'),
        None,
        CheckpointError,
    ),
    "header of 1 GiB": (".safetensors", safetensors(b"{", length=1024 * MIB), 1025 * MIB, CheckpointError),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_files_stay_in_bounds(tmp_path: Path, name: str) -> None:
    suffix, data, size, expected = LARGE[name]
    result = open_in_bounds(write(tmp_path, suffix, data, size=size))
    assert isinstance(result, expected), result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "bad JSON"),
        ("[]", "expected an object"),
        ("{}", "model_type"),
        ('{"model_type": 3}', "model_type is 3"),
        ('{"model_type": {"a": [1]}}', "model_type"),
        ('{"model_type": "llama", "model_type": "evil"}', "appears twice"),
        ('{"model_type": "llama", "a": ' + "[" * 5000, "nested deeper"),
        (" " * (9 * MIB), "at most"),
    ],
)
def test_hostile_config(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, ".safetensors", SAFETENSORS_SEED)
    (tmp_path / "config.json").write_text(text)
    result = open_in_bounds(path)
    assert isinstance(result, CheckpointError)
    assert expected in str(result)
    assert "config.json" in str(result)
