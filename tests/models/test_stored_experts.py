"""gpt-oss from safetensors: experts that become matrices on arrival, as trained and as published in blocks of four bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import reference_logits, tiny_checkpoint
from support.gguf_checkpoints import quantize
from support.running import PlainRunner, relative_error
from test_recording import budget_at

import offload
from offload.elements import BY_NAME
from offload.errors import CheckpointError
from offload.kernels.ggml.dequantize import dequantize
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model, default_context

TOKENS = [int(token) for token in np.random.default_rng(9).integers(0, 300, 30)]


def to_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[.., out, in] as blocks, scales, and what they mean; from ggml's own quantization."""
    raw = quantize(values.numpy(), "MXFP4").reshape(*values.shape[:-1], -1, 17)
    scales, packed = raw[..., 0], raw[..., 1:]
    nibbles = np.concatenate([packed & 0x0F, packed >> 4], axis=-1)  # values 0 .. 31 of a block in order
    blocks = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    meant = dequantize(raw.reshape(-1), BY_NAME["MXFP4"], values.numel()).reshape(values.shape)
    return torch.from_numpy(blocks.copy()), torch.from_numpy(scales.copy()), torch.from_numpy(meant)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in blocks, and the same weights as transformers would have trained them."""
    trained = tiny_checkpoint("gpt_oss", tmp_path_factory.mktemp("trained"))
    tensors, packed = load_file(trained / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor
            continue
        blocks, scales, meant = to_blocks(tensor.mT.contiguous())
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = meant.mT.contiguous()
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path_factory.mktemp("published")
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((trained / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, trained


def test_blocks_of_four_bits_agree_with_transformers(published: tuple[Path, Path]) -> None:
    folder, trained = published
    model = build_model(open_checkpoint(folder), 64)
    assert default_context(open_checkpoint(folder)) == 256
    assert model.experts[0].experts[0].gate.element.name == "MXFP4"
    assert relative_error(PlainRunner(model, 64).logits(TOKENS), reference_logits(trained, TOKENS)) <= 1e-4


@pytest.mark.parametrize("which", [0, 1])
def test_every_budget_and_backend_gives_the_same(
    published: tuple[Path, Path], which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected, seen = published[which], reference_logits(published[1], TOKENS).numpy(), []
    for share in (0.0, 0.6, 1.0):
        monkeypatch.setattr("offload.opening.make_plan", budget_at(share))
        with offload.load(folder, ctx=64, kv_type="f32") as engine:
            answer = engine.generate(TOKENS[:5], max_tokens=12, temperature=0, ignore_eos=True)
            seen.append((answer.tokens, engine.logits(TOKENS)))
    with offload.load(folder, ctx=64, kv_type="f32", device="torch:cpu") as engine:
        on_torch = engine.logits(TOKENS)
    for tokens, logits in seen[1:]:
        assert tokens == seen[0][0] and np.array_equal(logits, seen[0][1])
    # ggml computes products with blocks of four bits from activations of eight
    tolerance = (0.05, 1e-4)[which]
    assert np.abs(seen[0][1] - expected).max() <= tolerance * np.ptp(expected)
    assert np.abs(on_torch - expected).max() <= 1e-4 * np.ptp(expected)


def test_blocks_of_another_shape_are_refused(published: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = published
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"blk\.1\.experts\.down_proj_scales has shape"):
        build_model(open_checkpoint(tmp_path), 64)
