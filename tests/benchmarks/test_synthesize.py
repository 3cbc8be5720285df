"""The synthetic models are what they claim: readable by others, finite, and of the announced size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from harness.shapes import PRESETS, TINY
from harness.weights import matrix
from safetensors import safe_open

from offload.elements import element_type

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 49152


def script(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "tiny.gguf"
    script("benchmarks/synthesize.py", "dense-8b", str(path), "--tiny", "--alignment", "4096")
    return path


@pytest.fixture(scope="module")
def folder_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "tiny"
    script("benchmarks/synthesize.py", "llama-1b", str(path), "--tiny")
    return path


@pytest.mark.parametrize(("preset", "gigabytes"), [("dense-8b", 4.15), ("llama-1b", 2.15)])
def test_the_presets_have_the_announced_sizes(preset: str, gigabytes: float) -> None:
    shape = PRESETS[preset]
    elements = sum(int(np.prod(tensor.shape)) for tensor in shape.tensors(VOCAB_SIZE))
    assert elements * element_type(shape.element).bits_per_element / 8e9 == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize("element", ["Q4_K", "Q6_K", "Q8_0", "F32", "BF16"])
def test_weights_are_centred_and_as_wide_as_the_layer_wants(element: str) -> None:
    data = b"".join(matrix(element, (64, 1024), np.random.default_rng(0)))
    assert len(data) == 64 * element_type(element).row_bytes(1024)
    if element == "F32":
        values = np.frombuffer(data, np.float32)
    else:
        values = dequantize(np.frombuffer(data, np.uint8), GGMLQuantizationType[element])
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(1 / 32, rel=0.1)
    assert abs(values.mean()) < 0.1 * values.std()


def test_the_gguf_has_every_tensor_where_the_library_expects_it(gguf_model: Path) -> None:
    reader = GGUFReader(gguf_model)
    expected = {tensor.gguf: tensor.shape for tensor in TINY["dense-8b"].tensors(VOCAB_SIZE)}
    assert {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors} == expected
    assert all(tensor.data_offset % 4096 == 0 for tensor in reader.tensors)
    assert max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors) <= gguf_model.stat().st_size


def test_the_folder_opens_with_safetensors(folder_model: Path) -> None:
    expected = {tensor.huggingface for tensor in TINY["llama-1b"].tensors(VOCAB_SIZE)}
    with safe_open(folder_model / "model.safetensors", "pt") as file:
        assert set(file.keys()) == expected
        assert bool((file.get_tensor("model.norm.weight") == 1).all())
    assert json.loads((folder_model / "config.json").read_text(encoding="utf-8"))["vocab_size"] == VOCAB_SIZE


@pytest.mark.parametrize("peer", ["llama_cpp_decode.py", "offload_decode.py"])
def test_peers_print_the_same_line_for_a_gguf(gguf_model: Path, peer: str) -> None:
    out = script(f"benchmarks/peers/{peer}", str(gguf_model), "--tokens", "2", "--prompt-tokens", "4")
    figures = json.loads(out.splitlines()[-1])
    assert figures["decode_tps"] > 0
    assert len(figures["tokens"]) == 3


@pytest.mark.parametrize("peer", ["accelerate_disk.py", "offload_decode.py"])
def test_peers_print_the_same_line_for_a_folder(folder_model: Path, peer: str) -> None:
    out = script(f"benchmarks/peers/{peer}", str(folder_model), "--tokens", "2", "--prompt-tokens", "4")
    figures = json.loads(out.splitlines()[-1])
    assert figures["decode_tps"] > 0
    assert len(figures["tokens"]) == 3
