"""GGUF files written and read by the `gguf` package, against our reader."""

from __future__ import annotations

import shutil
from array import array as packed
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.demo import demo_model
from support.headers import F32, STRING, Gguf, array, key, nested, tensor

from offload.errors import CheckpointError
from offload.models.checkpoint import open_checkpoint
from offload.models.checkpoint.packed import PackedStrings

DEMO = demo_model()
ONLY_ACTIVATIONS = {gguf.GGMLQuantizationType.Q8_1, gguf.GGMLQuantizationType.Q8_K}  # no file stores these


def writer(path: Path, **options: int) -> gguf.GGUFWriter:
    return gguf.GGUFWriter(path, "llama", **options)  # type: ignore[arg-type]


def finish(out: gguf.GGUFWriter) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def split_model(folder: Path, num_tensors: int = 5) -> list[Path]:
    out = writer(folder / "model.gguf", split_max_tensors=2)
    for i in range(num_tensors):
        out.add_tensor(f"blk.{i}.weight", np.full((2, 4), i, np.float32))
    finish(out)
    return sorted(folder.glob("*.gguf"))


def test_demo_model_agrees_with_the_gguf_package() -> None:
    ours, theirs = open_checkpoint(DEMO), gguf.GGUFReader(DEMO)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for expected in theirs.tensors:
        info = ours.tensors[expected.name]
        assert info.shape == tuple(int(size) for size in reversed(expected.shape))
        assert info.element.name == expected.tensor_type.name
        assert (info.extent.offset, info.nbytes) == (expected.data_offset, expected.n_bytes)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            expected_value, value = field.contents(), ours.metadata[name]
            is_list = isinstance(expected_value, list)
            assert (list(value) if is_list else value) == expected_value, name  # type: ignore[call-overload]
    assert ours.architecture == "llama"
    assert ours.files == (DEMO,)
    assert ours.nbytes == sum(int(tensor.n_bytes) for tensor in theirs.tensors)


def test_a_folder_with_one_gguf_is_that_file() -> None:
    assert open_checkpoint(DEMO.parent) == open_checkpoint(DEMO)
    assert open_checkpoint(str(DEMO)) == open_checkpoint(DEMO)


def test_a_large_vocabulary(tmp_path: Path) -> None:
    tokens = [f"token{i}é" for i in range(150_000)]
    path = tmp_path / "model.gguf"
    keys = (key("general.architecture", STRING, "llama"), array("tokens", STRING, tokens))
    path.write_bytes(Gguf(keys=(*keys, array("scores", F32, [0.5] * 150_000))).build())
    metadata = open_checkpoint(path).metadata
    assert metadata["tokens"] == tokens
    assert isinstance(metadata["scores"], packed)
    assert metadata["scores"] == packed("f", [0.5] * 150_000)


def test_every_value_type(tmp_path: Path) -> None:
    out = writer(tmp_path / "model.gguf")
    out.add_uint8("u8", 255)
    out.add_int8("i8", -128)
    out.add_uint16("u16", 65535)
    out.add_int16("i16", -32768)
    out.add_uint32("u32", 2**32 - 1)
    out.add_int32("i32", -(2**31))
    out.add_uint64("u64", 2**64 - 1)
    out.add_int64("i64", -(2**63))
    out.add_float32("f32", 0.25)
    out.add_float64("f64", 0.1)
    out.add_bool("yes", True)
    out.add_string("text", "Grüße 🎈")
    out.add_array("texts", ["a", "", "ß"])
    out.add_array("numbers", [1, -2, 3])
    out.add_array("fractions", [0.5, 1.5])
    out.add_array("flags", [True, False])
    finish(out)
    assert dict(open_checkpoint(tmp_path).metadata) == {
        "general.architecture": "llama",
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -32768,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f32": 0.25,
        "f64": 0.1,
        "yes": True,
        "text": "Grüße 🎈",
        "texts": ("a", "", "ß"),
        "numbers": (1, -2, 3),
        "fractions": (0.5, 1.5),
        "flags": (True, False),
    }


@pytest.mark.parametrize("length", [3, 5000])
def test_strings_that_are_not_utf8_survive(tmp_path: Path, length: int) -> None:
    raw = [b"\xff\xfe", b"ok", *[b"\xe2\x96"] * (length - 2)]
    keys = (key("general.architecture", STRING, "llama"), array("a.b", STRING, raw))
    (tmp_path / "model.gguf").write_bytes(Gguf(keys=keys).build())
    texts = open_checkpoint(tmp_path).metadata["a.b"]
    assert isinstance(texts, Sequence)
    assert [text.encode("utf-8", "surrogateescape") for text in texts] == raw


def test_nested_arrays(tmp_path: Path) -> None:
    keys = (key("general.architecture", STRING, "llama"), nested("a.b", 2))
    (tmp_path / "model.gguf").write_bytes(Gguf(keys=keys).build())
    assert open_checkpoint(tmp_path).metadata["a.b"] == (((),),)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 32, 4096])
def test_alignment_and_versions(tmp_path: Path, version: int, alignment: int) -> None:
    keys = (key("general.architecture", STRING, "llama"), key("general.alignment", 4, alignment))
    tensors = (tensor("b", [4, 2], offset=4096), tensor("a", [2], offset=0))
    built = Gguf(keys=keys, tensors=tensors, data=bytes(4096 + 32), version=version, alignment=alignment).build()
    (tmp_path / "model.gguf").write_bytes(built)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["b"].shape == (2, 4)
    assert checkpoint.tensors["b"].extent.end == len(built)
    assert checkpoint.tensors["a"].extent.offset == len(built) - 4096 - 32
    assert checkpoint.tensors["a"].extent.offset % alignment == 0


@pytest.mark.parametrize("code", sorted(set(gguf.GGML_QUANT_SIZES) - ONLY_ACTIVATIONS))
def test_every_element_type_of_the_gguf_package(tmp_path: Path, code: gguf.GGMLQuantizationType) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[code]
    data = bytes(3 * 2 * nbytes)
    (tmp_path / "model.gguf").write_bytes(Gguf(tensors=(tensor("t", [2 * block, 3], code),), data=data).build())
    info = open_checkpoint(tmp_path).tensors["t"]
    assert (info.element.name, info.shape, info.nbytes) == (code.name, (3, 2 * block), len(data))


def test_any_part_opens_the_whole_split(tmp_path: Path) -> None:
    parts = split_model(tmp_path)
    assert len(parts) == 3
    checkpoints = [open_checkpoint(part) for part in (*parts, tmp_path)]
    assert all(checkpoint == checkpoints[0] for checkpoint in checkpoints)
    whole = checkpoints[0]
    assert whole.path == parts[0]
    assert whole.files == tuple(parts)
    assert list(whole.tensors) == [f"blk.{i}.weight" for i in range(5)]
    for i, info in enumerate(whole.tensors.values()):
        assert info.extent.path == parts[i // 2]
        data = info.extent.path.read_bytes()[info.extent.offset : info.extent.end]
        assert np.frombuffer(data, np.float32).tolist() == [i] * 8


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = split_model(tmp_path)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: part 2 of 3 is missing"):
        open_checkpoint(parts[2])


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    parts = split_model(tmp_path)
    shutil.copy(parts[0], parts[1])
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: split.no 0 of split.count 3"):
        open_checkpoint(parts[0])
    (other := tmp_path / "other").mkdir()
    shutil.copy(split_model(other, num_tensors=6)[1], parts[1])
    shutil.copy(other / parts[2].name, parts[2])
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count says 5, parts hold 6"):
        open_checkpoint(parts[0])


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    for number in range(2):
        keys = (key("general.architecture", STRING, "llama"), key("split.no", 2, number), key("split.count", 2, 2))
        built = Gguf(keys=keys, tensors=(tensor("t", [8]),), data=bytes(32)).build()
        (tmp_path / f"m-0000{number + 1}-of-00002.gguf").write_bytes(built)
    with pytest.raises(CheckpointError, match=r"tensor 't' is also in m-00001-of-00002\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["m-00000-of-00002.gguf", "m-00003-of-00002.gguf"])
def test_a_part_number_out_of_range(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(Gguf().build())
    with pytest.raises(CheckpointError, match="the name says part"):
        open_checkpoint(tmp_path / name)


def test_the_fingerprint_depends_on_content_and_not_on_the_path(tmp_path: Path) -> None:
    first = Gguf(tensors=(tensor("t", [8]),), data=bytes(32))
    seen = []
    for name, built in (("a", first.build()), ("b", first.build()), ("c", first._replace(data=bytes(64)).build())):
        (tmp_path / f"{name}.gguf").write_bytes(built)
        seen.append(open_checkpoint(tmp_path / f"{name}.gguf").fingerprint)
    assert seen[0] == seen[1] != seen[2]
    assert len(seen[0]) == 64


def test_packed_strings_are_a_sequence(tmp_path: Path) -> None:
    expected = [f"{i}" * (i % 7) for i in range(2000)]
    keys = (key("general.architecture", STRING, "llama"), array("a.b", STRING, expected))
    (tmp_path / "model.gguf").write_bytes(Gguf(keys=keys).build())
    texts = open_checkpoint(tmp_path).metadata["a.b"]
    assert isinstance(texts, PackedStrings)
    assert (len(texts), texts[0], texts[-1], texts[1999]) == (2000, expected[0], expected[-1], expected[-1])
    assert texts[5:9] == tuple(expected[5:9])
    assert texts == expected
    assert texts == tuple(expected)
    assert texts != expected[:-1]
    assert texts != "text"
    assert texts.index(expected[8]) == 8
    assert hash(texts) == hash(tuple(expected))
    with pytest.raises(IndexError, match="index 2000 of 2000"):
        texts[2000]


@pytest.mark.parametrize("name", ["\x1b[2J", "x" * 100_000, "two\nlines"])
def test_an_architecture_is_a_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(Gguf(keys=(key("general.architecture", STRING, name),)).build())
    with pytest.raises(CheckpointError, match=r"general\.architecture is '.*', expected a name$") as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(path))
