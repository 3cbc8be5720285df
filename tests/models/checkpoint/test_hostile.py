"""Every hostile file ends in one CheckpointError that says what is wrong, within 64 MB.

That it also takes less than a second is measured by benchmarks/headers.py.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from support import hostile
from support.headers import F32, STRING, Gguf, array, entry, key, safetensors, tensor

from offload.errors import CheckpointError
from offload.models.checkpoint import Checkpoint, open_checkpoint
from offload.units import MIB

CASES = [
    *(pytest.param(".gguf", *case, id=f"gguf: {name}") for name, case in hostile.GGUF.items()),
    *(pytest.param(".safetensors", *case, id=f"safetensors: {name}") for name, case in hostile.SAFETENSORS.items()),
]


def open_in_bounds(path: Path) -> Checkpoint | CheckpointError:
    result: Checkpoint | CheckpointError
    tracemalloc.start()
    try:
        result = open_checkpoint(path)
    except CheckpointError as error:
        result = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * MIB, f"{peak / MIB:.1f} MiB"
    return result


@pytest.mark.parametrize(("suffix", "data", "expected"), CASES)
def test_refused_with_the_reason(tmp_path: Path, suffix: str, data: bytes, expected: str) -> None:
    path = hostile.write(tmp_path, suffix, data)
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
        open_checkpoint(hostile.write(tmp_path, ".gguf", data))
    data, _ = hostile.SAFETENSORS["size does not match"]
    with pytest.raises(CheckpointError) as safe:
        open_checkpoint(hostile.write(tmp_path, ".safetensors", data))
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
    open_checkpoint(hostile.write(tmp_path, suffix, seed))
    for length in range(len(seed)):
        with pytest.raises(CheckpointError):
            open_checkpoint(hostile.write(tmp_path, suffix, seed[:length]))


@pytest.mark.parametrize("name", hostile.LARGE)
def test_large_files_stay_in_bounds(tmp_path: Path, name: str) -> None:
    suffix, data, size, opens = hostile.LARGE[name]
    result = open_in_bounds(hostile.write(tmp_path, suffix, data, size=size))
    assert isinstance(result, Checkpoint if opens else CheckpointError), result


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
    path = hostile.write(tmp_path, ".safetensors", SAFETENSORS_SEED)
    (tmp_path / "config.json").write_text(text)
    result = open_in_bounds(path)
    assert isinstance(result, CheckpointError)
    assert expected in str(result)
    assert "config.json" in str(result)
