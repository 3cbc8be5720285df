"""Valid files, damaged at random: whatever comes, a Checkpoint that keeps its promises or a CheckpointError."""

from __future__ import annotations

import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.headers import BOOL, F32, STRING, U32, Gguf, array, entry, key, nested, tensor
from support.headers import safetensors as build

from offload.errors import CheckpointError
from offload.models.checkpoint import Checkpoint, open_checkpoint

GGUF_SEEDS = (
    Gguf(
        keys=(
            key("general.architecture", STRING, "llama"),
            key("general.alignment", U32, 64),
            array("tokenizer.ggml.tokens", STRING, ["a", "bc", "", "ü"]),
            array("tokenizer.ggml.scores", F32, [0.5, 1.5]),
            array("flags", BOOL, [True, False]),
            nested("nested", 3),
        ),
        tensors=(tensor("blk.0.weight", [32, 2], 2), tensor("norm", [8], offset=64)),
        data=bytes(64 + 32),
        alignment=64,
    ).build(),
    Gguf(
        keys=(key("general.architecture", STRING, "qwen3"), array("tokens", STRING, ["token"] * 1100)),
        tensors=(tensor("t", [4, 3, 2], 1),),
        data=bytes(48),
        version=2,
    ).build(),
)
SAFETENSORS_SEEDS = (
    build(
        {
            "__metadata__": {"format": "pt"},
            "model.norm.weight": entry("BF16", [4, 2], 0, 16),
            "scale": entry("F32", [], 16, 20),
            "mask": entry("BOOL", [4], 20, 24),
        },
        bytes(24),
    ),
    build('{"a\\"b\\u00fc":{"dtype":"I64","shape":[2,0],"data_offsets":[0,0]}}     '),
)
NUMBERS = st.sampled_from([0, 1, 2, 31, 255, 2**30 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])
TEXTS = st.sampled_from([b"{", b"[", b"]", b'"', b"\\", b"-1", b"1e9", b"NaN", b"null", b"\xff", b"[" * 40, b"9" * 50])
RUNS = settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def damaged(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A seed after one to four flips, overwrites, cuts, insertions and splices."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "number", "text", "truncate", "delete", "repeat", "splice", "extend"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "number":
                size = draw(st.sampled_from([1, 4, 8]))
                data[at : at + size] = struct.pack("<Q", draw(NUMBERS))[:size]
            case "text":
                text = draw(TEXTS)
                data[at : at + draw(st.sampled_from([0, len(text)]))] = text
            case "truncate":
                del data[at:]
            case "delete":
                del data[at : at + draw(st.integers(1, 16))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "splice":
                data[at:] = draw(st.sampled_from(seeds))[draw(st.integers(0, 64)) :]
            case "extend":
                data += bytes(draw(st.integers(1, 64)))
    return bytes(data)


def opened(suffix: str, data: bytes) -> Checkpoint | None:
    """The checkpoint, or None where it was refused. Anything but CheckpointError is a bug and passes through."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        path.write_bytes(data)
        path.with_name("config.json").write_text('{"model_type": "llama"}')
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            return None


def check_promises(checkpoint: Checkpoint, size: int) -> None:
    end = 0
    for info in sorted(checkpoint.tensors.values(), key=lambda info: (info.extent.offset, info.nbytes)):
        assert end <= info.extent.offset <= info.extent.end <= size
        assert info.num_elements * info.element.block_bytes == info.nbytes * info.element.block_elements
        end = info.extent.end


@RUNS
@given(damaged(GGUF_SEEDS))
def test_gguf(data: bytes) -> None:
    checkpoint = opened(".gguf", data)
    if checkpoint is not None:
        check_promises(checkpoint, len(data))
        for content in checkpoint.metadata.values():
            assert content == content or isinstance(content, float)  # every lazily decoded string can be decoded
            assert not hasattr(content, "__len__") or len(list(content)) == len(content)  # type: ignore[call-overload]


@RUNS
@given(damaged(SAFETENSORS_SEEDS))
def test_safetensors_accepts_no_more_than_the_safetensors_package(data: bytes) -> None:
    checkpoint = opened(".safetensors", data)
    if checkpoint is not None:
        check_promises(checkpoint, len(data))
        theirs = dict(safetensors.deserialize(data))
        for name, info in checkpoint.tensors.items():
            assert theirs[name]["shape"] == list(info.shape)
            assert theirs[name]["data"] == data[info.extent.offset : info.extent.end]


def test_the_seeds_are_valid() -> None:
    assert all(opened(".gguf", seed) for seed in GGUF_SEEDS)
    assert all(opened(".safetensors", seed) for seed in SAFETENSORS_SEEDS)


@RUNS
@given(st.binary(max_size=200), st.sampled_from([b"GGUF\x03\0\0\0", b"GGUF\x02\0\0\0", b""]))
def test_noise(noise: bytes, head: bytes) -> None:
    assert opened(".gguf", head + noise) is None
    assert opened(".safetensors", noise) is None
