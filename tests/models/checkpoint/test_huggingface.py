"""Safetensors files written by the `safetensors` package, and the folders around them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.headers import entry
from support.headers import safetensors as build

from offload.errors import CheckpointError
from offload.models.checkpoint import open_checkpoint


def write_config(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))


def write_shards(folder: Path) -> list[Path]:
    """Two shards and an index; `b` is in the first."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    safetensors.torch.save_file({"b": torch.ones(2, 3), "c": torch.ones(4)}, folder / names[0])
    safetensors.torch.save_file({"a": torch.zeros(5, dtype=torch.bfloat16)}, folder / names[1])
    write_index(folder, {"a": names[1], "b": names[0], "c": names[0]})
    write_config(folder)
    return [folder / name for name in names]


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {
        "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "brain": torch.arange(8, dtype=torch.bfloat16).reshape(2, 2, 2),
        "full": torch.arange(5, dtype=torch.float32),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "positions": torch.arange(4),
    }
    safetensors.torch.save_file({**tensors, "mask": torch.ones(3, dtype=torch.bool)}, tmp_path / "model.safetensors")
    write_config(tmp_path, hidden_size=3)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(expected.shape)
        data = bytearray(info.extent.path.read_bytes()[info.extent.offset : info.extent.end])
        assert len(data) == info.nbytes == expected.nbytes
        if data:
            assert torch.equal(torch.frombuffer(data, dtype=expected.dtype).reshape(expected.shape), expected)
    names = {name: info.element.name for name, info in checkpoint.tensors.items()}
    assert names == {
        "half": "F16",
        "brain": "BF16",
        "full": "F32",
        "scalar": "F32",
        "empty": "F32",
        "positions": "I64",
    }
    assert checkpoint.metadata == {"model_type": "llama", "hidden_size": 3}
    assert (checkpoint.path, checkpoint.format, checkpoint.architecture) == (tmp_path, "huggingface", "llama")


def test_an_index_names_the_shards(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    (tmp_path / "unrelated.safetensors").write_bytes(b"not even a header")
    by_folder = open_checkpoint(tmp_path)
    assert by_folder.files == tuple(shards)
    assert {name: info.extent.path for name, info in by_folder.tensors.items()} == {
        "a": shards[1],
        "b": shards[0],
        "c": shards[0],
    }
    assert open_checkpoint(shards[1]) == by_folder


def test_shards_without_an_index(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b", "c"}
    assert set(open_checkpoint(shards[0]).tensors) == {"b", "c"}
    safetensors.torch.save_file({"b": torch.ones(1)}, tmp_path / "z.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'b' is also in model-00001-of-00002\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_file_beside_an_index_that_does_not_name_it(tmp_path: Path) -> None:
    write_shards(tmp_path)
    safetensors.torch.save_file({"z": torch.ones(1)}, tmp_path / "z.safetensors")
    assert set(open_checkpoint(tmp_path / "z.safetensors").tensors) == {"z"}


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/model.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "model\0.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: object) -> None:
    (folder := tmp_path / "model").mkdir()
    write_shards(folder)
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="is not the name of a"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({}, "weight_map is"),
        ([], "weight_map is"),
        ({"a": "model-00003-of-00003.safetensors"}, "is missing; fetch all files"),
        ({"a": f"{'x' * 5000}.safetensors"}, "is missing; fetch all files"),
        ({"a": "\ud800.safetensors"}, "is missing; fetch all files"),
        ({"b": "model-00002-of-00002.safetensors"}, "tensor 'b' is not in 'model-00002-of-00002.safetensors'"),
    ],
)
def test_an_index_that_does_not_match_the_files(tmp_path: Path, weight_map: object, expected: str) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(tmp_path)


def test_an_index_may_name_skipped_buffers(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(1), "mask": torch.ones(1) > 0}, tmp_path / "m.safetensors")
    write_index(tmp_path, {"w": "m.safetensors", "mask": "m.safetensors"})
    write_config(tmp_path)
    assert set(open_checkpoint(tmp_path).tensors) == {"w"}


@pytest.mark.parametrize("nested", [True, False])
def test_multimodal_gemma3_shows_its_language_model(tmp_path: Path, nested: bool) -> None:
    names = (
        ["model.language_model.norm.weight", "lm_head.weight", "model.vision_tower.x", "model.multi_modal_projector.y"]
        if nested
        else ["language_model.model.norm.weight", "language_model.lm_head.weight", "vision_tower.x"]
    )
    safetensors.torch.save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    write_config(
        tmp_path,
        model_type="gemma3",
        eos_token_id=[1, 106],
        vision_config={"hidden_size": 9},
        text_config={"model_type": "gemma3_text", "hidden_size": 2},
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.architecture == "gemma3_text"
    assert checkpoint.metadata == {"model_type": "gemma3_text", "hidden_size": 2, "eos_token_id": [1, 106]}
    assert set(checkpoint.tensors) == {"model.norm.weight", "lm_head.weight"}


def test_remote_code_is_ignored(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    write_config(tmp_path, auto_map={"AutoConfig": "evil--repo.Config"})
    (tmp_path / "modeling.py").write_text("raise SystemExit('ran')")
    assert open_checkpoint(tmp_path).architecture == "llama"


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        open_checkpoint(tmp_path)


def test_a_mask_is_skipped_and_a_foreign_weight_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(build({"mask": entry("U8", [4], 0, 4), "w": entry("F16", [2], 4, 8)}, bytes(8)))
    assert set(open_checkpoint(path).tensors) == {"w"}
    path.write_bytes(build({"w": entry("F4", [8], 0, 4)}, bytes(4)))
    with pytest.raises(CheckpointError, match="'w': dtype F4 cannot be computed with"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_is_refused_with_the_next_step(tmp_path: Path, name: str) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / name)
    write_config(tmp_path)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=rf"{name}: a pickle can run code .*\.safetensors files"):
            open_checkpoint(path)


def test_places_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        (tmp_path / "two" / f"{name}.gguf").write_bytes(b"GGUF")
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, expected in (
        (tmp_path, "holds no .gguf and no .safetensors"),
        (tmp_path / "two", r"holds 2 GGUF models \(a.gguf, b.gguf\); name one"),
        (tmp_path / "missing.gguf", "does not exist"),
        (tmp_path / "missing.safetensors", "config.json: missing"),
        (tmp_path / "pipe.gguf", "is not a regular file"),
        (tmp_path / ("x" * 5000), "does not exist"),
        (tmp_path / "a\0b", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            open_checkpoint(path)


def test_a_relative_path_outlives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert all(path.is_absolute() for path in open_checkpoint(".").files)


@pytest.mark.parametrize("name", ["\x1b[2J", "x" * 100_000, "two\nlines", "\ud800"])
def test_a_model_type_is_a_name(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    write_config(tmp_path, model_type=name)
    with pytest.raises(CheckpointError, match=r"model_type is '.*', expected a name$") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
