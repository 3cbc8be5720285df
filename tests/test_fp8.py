"""Checkpoints in FP8 on torch devices: the logits of the same weights in float32, wherever they lie; elsewhere one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import reference_logits
from support.devices import computed_on
from support.fp8_checkpoints import Published, Scaled, fp8_checkpoint
from test_device_experts import hold
from test_engine import split_at

import offload
from offload.demand import host_knows_experts, shareable
from offload.elements import F8_E4M3
from offload.engine import plan_model
from offload.errors import CheckpointError, UnsupportedError
from offload.kernels.torch.products import FEW_TOKENS
from offload.models.base import Model
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model

PROMPT = [7 * n % 250 for n in range(FEW_TOKENS + 12)]


@pytest.mark.parametrize(
    ("family", "scaled"),
    [("llama", "block"), ("qwen3", "row"), ("llama", "tensor"), ("qwen3_moe", "block"), ("qwen3_moe", "row"),
     ("deepseek_v3", "block")],
)  # fmt: skip
def test_the_logits_are_those_of_the_same_weights_in_float32(
    family: str, scaled: Scaled, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a prompt and token by token; all on the device, a part of it, and from disk, with the same bits."""
    both, seen = fp8_checkpoint(family, tmp_path, scaled), []
    expected = reference_logits(both.meant, PROMPT).numpy()
    for share, ram in ((1.0, None), (0.5, None), (0.0, "minimum")):
        hold(monkeypatch, share)
        if share < 1:
            monkeypatch.setattr("offload.opening.make_plan", split_at(share, share))
        with offload.load(both.folder, ctx=64, ram=ram, **computed_on(device)) as engine:
            used = {matrix.element.name for matrix in engine._runner.opened.model.all_matrices()}
            assert used == {"F8_E4M3", "BF16"}
            seen.append((engine.logits(PROMPT), engine._stepwise_logits(PROMPT[:FEW_TOKENS])))
    for logits, steps in seen:
        assert np.array_equal(logits, seen[0][0]) and np.array_equal(steps, seen[0][1])
    many = 1e-4 if device == "cpu" else 2e-2  # a card multiplies many tokens in bfloat16
    assert np.abs(seen[0][0] - expected).max() <= many * np.ptp(expected)
    assert np.abs(seen[0][1] - expected[:FEW_TOKENS]).max() <= 1e-4 * np.ptp(expected)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return fp8_checkpoint("qwen3_moe", tmp_path_factory.mktemp("mixture"))


def test_the_cpu_refuses_in_one_line_and_its_kernels_are_never_asked(mixture: Published) -> None:
    for attempt in (offload.load, plan_model):
        with pytest.raises(UnsupportedError, match=r"_proj\.weight is F8_E4M3, .*--device cuda, or torch:cpu.*GGUF"):
            attempt(mixture.folder, device="cpu")
    model = build_model(open_checkpoint(mixture.folder), 64)
    assert not host_knows_experts(model)
    assert shareable(model) == {name for name, matrix in model.matrices.items() if name.startswith("output")}
    meant = build_model(open_checkpoint(mixture.meant), 64)
    assert host_knows_experts(meant) and len(shareable(meant)) > len(shareable(model))


# ---- what files get wrong

QUERY, EXPERT = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


def changed(both: Published, folder: Path, change: Change) -> Model:
    tensors = load_file(both.folder / "model.safetensors")
    config = json.loads((both.folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return build_model(open_checkpoint(folder), 64)


def quantization(**section: object) -> Change:
    return lambda tensors, config: config.update(quantization_config=section)


def several_blocks(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Two sizes that give the same number of scales."""
    groups = {str(size): {"weights": {"block_structure": [size, size]}} for size in (127, 128)}
    quantization(quant_method="compressed-tensors", format="float-quantized", config_groups=groups)(tensors, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop(f"{QUERY}_scale_inv"), r"blk\.1\.attn_q\.weight is F8_E4M3, and has no weight_"),
        (lambda tensors, _: tensors.pop(f"{EXPERT}_scale_inv"), r"blk\.1\.ffn_up\.3\.weight is F8_E4M3, and has no weight_"),
        (
            lambda tensors, _: tensors.update({f"{QUERY}_scale_inv": torch.ones(2, 3)}),
            r"attn_q\.weight .* have shape \(2, 3\); expected that of one weight_block_size",
        ),
        (quantization(quant_method="fp8"), r"have shape \(1, 2\); expected that of one weight_block_size"),
        (quantization(quant_method="fp8", weight_block_size=[128, 0]), "expected that of one weight_block_size"),
        (quantization(quant_method="fp8", weight_block_size={"a": []}, config_groups=[7]), "expected that of one"),
        (several_blocks, "expected that of one weight_block_size"),
        (
            lambda tensors, _: tensors.update({EXPERT: tensors[EXPERT].float().bfloat16()}),
            r"ffn_up\.3\.weight is BF16; blk\.1\.ffn_up\.0\.weight is F8_E4M3",
        ),
        (
            lambda tensors, _: tensors.update({f"{EXPERT}_scale_inv": torch.ones(160, 1)}),
            r"ffn_up\.3\.weight has scales of 1 by 160 elements; blk\.1\.ffn_up\.0\.weight of others",
        ),
    ],
)  # fmt: skip
def test_scales_that_do_not_fit_are_named(mixture: Published, tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        changed(mixture, tmp_path, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantization(quant_method="compressed-tensors", format="pack-quantized"), "in the format 'pack-quantized'; use"),
        (
            quantization(quant_method="compressed-tensors", format="float-quantized", transform_config={"R1": 1}),
            "'compressed-tensors' with transforms; use the original",
        ),
        (
            lambda tensors, _: tensors.update({f"{QUERY}_scale_inv": torch.ones(1, 2, dtype=torch.int32)}),
            "scales of type I32 are not supported",
        ),
        (lambda tensors, _: tensors.update({f"{QUERY}_zero_point": torch.ones(1)}), "FP8 with zero points"),
        (
            lambda tensors, _: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)}),
            r"output\.weight: only linear layers and experts .* in F8_E4M3; use a bfloat16",
        ),
        (
            lambda tensors, _: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}),
            r"output_norm\.weight: only linear layers",
        ),
    ],
)  # fmt: skip
def test_what_fp8_checkpoints_may_not_be_is_named(
    mixture: Published, tmp_path: Path, change: Change, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        changed(mixture, tmp_path, change)


def test_blocks_may_be_those_of_compressed_tensors(mixture: Published, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name.removesuffix("_inv")] = tensors.pop(name)
        groups = {"group_0": {"weights": {"strategy": "block", "block_structure": [128, 128]}}}
        quantization(quant_method="compressed-tensors", format="float-quantized", config_groups=groups)(tensors, config)

    found = changed(mixture, tmp_path, change)
    same = build_model(open_checkpoint(mixture.folder), 64)
    assert {name: info.scales for name, info in found.matrices.items()} == {
        name: info.scales for name, info in same.matrices.items()
    }
    assert sum(info.element == F8_E4M3 for info in found.matrices.values()) == 4 * 3
