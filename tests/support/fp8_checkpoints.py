"""Tiny checkpoints in FP8, stored as published ones are, beside what they mean: the same weights in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import tiny_checkpoint

Scaled = Literal["block", "row", "tensor"]
BLOCK = 128
SIZES = {"hidden_size": 160, "intermediate_size": 288, "moe_intermediate_size": 160}
"""More than a block and no multiple of one, but of 32: what is left of a vector of activations a CPU computes otherwise."""
_LARGEST = 448.0
_CONFIGS: dict[Scaled, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "row": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    "tensor": {"quant_method": "fp8", "activation_scheme": "static"},
}


class Published(NamedTuple):
    """Folders: as published, and the same weights in float32."""

    folder: Path
    meant: Path


def fp8_checkpoint(family: str, folder: Path, scaled: Scaled = "block", **overrides: Any) -> Published:
    """Writes both. Norms, biases, routers, the token table and the head are bfloat16."""
    published, meant = Published(folder / "fp8", folder / "meant")
    tiny_checkpoint(family, meant, **(SIZES | overrides))
    published.mkdir()
    tensors, stored = load_file(meant / "model.safetensors"), {}
    for name, values in list(tensors.items()):
        if not name.endswith(("_proj.weight", "_mqa.weight")):
            stored[name] = values.bfloat16()
            tensors[name] = stored[name].float()
            continue
        codes, scales, tensors[name] = quantize(values, scaled)
        stored[name] = codes
        stored[f"{name}_scale_inv" if scaled == "block" else f"{name}_scale"] = scales
        stored[name.replace(".weight", ".input_scale")] = torch.tensor(0.03)  # of activations, which stay as they are
    save_file(tensors, meant / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, published / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((meant / "config.json").read_text())
    config["quantization_config"] = _CONFIGS[scaled]
    (published / "config.json").write_text(json.dumps(config))
    return Published(published, meant)


def quantize(values: torch.Tensor, scaled: Scaled) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and what they mean: code times scale, in float32."""
    rows, columns = values.shape
    height, width = {"block": (BLOCK, BLOCK), "row": (1, columns), "tensor": (rows, columns)}[scaled]
    largest = torch.stack(
        [torch.stack([part.abs().max() for part in band.split(width, 1)]) for band in values.split(height, 0)]
    )
    scales = largest / _LARGEST
    kept = scales.bfloat16() if scaled == "row" else scales.squeeze() if scaled == "tensor" else scales
    scales = kept.float().reshape(scales.shape)
    spread = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    codes = (values / spread).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return codes, kept, codes.float() * spread
