"""Runs a model on `TorchOps` with all weights in memory: the plainest engine there can be."""

from __future__ import annotations

import math

import torch

from offload.kernels.torch.cache import TorchCache
from offload.kernels.torch.dequantize import dequantize
from offload.kernels.torch.ops import TorchOps
from offload.models.base import Model, Vector
from offload.models.checkpoint.base import TensorInfo


def read_tensor(tensor: TensorInfo) -> torch.Tensor:
    """The tensor's values as float32."""
    with tensor.extent.path.open("rb") as file:
        file.seek(tensor.extent.offset)
        raw = bytearray(file.read(tensor.extent.nbytes))
    return dequantize(torch.frombuffer(raw, dtype=torch.uint8), tensor.element, tensor.shape)


def read_vector(vector: Vector) -> torch.Tensor:
    """The vector's values, offset included."""
    if vector.tensor is None:
        return torch.tensor(vector.values, dtype=torch.float32)
    return read_tensor(vector.tensor) + vector.offset


class PlainRunner:
    """Everything resident, one batch at a time."""

    def __init__(self, model: Model, ctx: int) -> None:
        config = model.config
        self.model = model
        self.weights = {name: read_tensor(tensor) for name, tensor in model.matrices.items()}
        self.weights |= {name: read_vector(vector) for name, vector in model.vectors.items()}
        self.embedding = read_tensor(model.embedding)
        self.cache = TorchCache(
            config.num_layers, ctx, config.num_kv_heads, config.cache_dims, torch.float32, torch.device("cpu")
        )

    def logits(self, tokens: list[int], start: int = 0, rows: list[int] | None = None) -> torch.Tensor:
        """Logits of `rows` of the batch (all of them by default), which begins at position `start`."""
        positions = torch.arange(start, start + len(tokens))
        output_rows = torch.arange(len(tokens)) if rows is None else torch.tensor(rows)
        ops = TorchOps(self.weights.__getitem__, self.cache, positions, output_rows)
        x = self.embedding[tokens] * self.model.config.embedding_scale
        layers, heads = self.model.stages[: -self.model.head_parts], self.model.stages[-self.model.head_parts :]
        for stage in layers:
            x = stage.forward(ops, x)
            if stage.routes:
                self._compute_experts(ops, stage.layer)
        return torch.cat([head.forward(ops, x) for head in heads], dim=-1)

    def _compute_experts(self, ops: TorchOps, layer: int) -> None:
        experts = self.model.experts[layer]
        for number in ops.routed[layer].experts.unique().tolist():
            matrices = [read_tensor(matrix) for matrix in experts.experts[number]]
            ops.expert(experts, number, matrices)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the range of the expected logits."""
    spread = float(expected.max() - expected.min())
    assert math.isfinite(spread) and spread > 0
    return float((actual - expected).abs().max()) / spread
