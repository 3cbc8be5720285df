"""Runs a model on `TorchOps` with all weights in memory: the plainest engine there can be."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch

from offload.blocks import Extent
from offload.kernels.torch.cache import TorchCache
from offload.kernels.torch.dequantize import dequantize
from offload.kernels.torch.ops import TorchOps
from offload.kernels.torch.positions import Positions
from offload.models.base import ExpertLayer, Model, Vector
from offload.models.checkpoint.base import TensorInfo
from offload.unpacking import unpack


def read_tensor(tensor: TensorInfo) -> torch.Tensor:
    """The tensor's values as float32."""
    raw = bytearray(read_bytes(tensor.extent))
    return dequantize(torch.frombuffer(raw, dtype=torch.uint8), tensor.element, tensor.shape)


def read_bytes(extent: Extent) -> bytes:
    """What lies there in the file."""
    with extent.path.open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.nbytes)


def read_vector(vector: Vector) -> torch.Tensor:
    """The vector's values, offset included."""
    if vector.stacked:
        return torch.cat([read_tensor(tensor).reshape(-1) for tensor in vector.stacked])
    if vector.tensor is None:
        return torch.tensor(vector.values, dtype=torch.float32)
    values = read_tensor(vector.tensor) + vector.offset
    return values[..., vector.start :: vector.step]


class PlainRunner:
    """Everything resident, one batch at a time."""

    def __init__(self, model: Model, ctx: int) -> None:
        config = model.config
        self.model = model
        self.weights = {name: read_tensor(tensor) for name, tensor in model.matrices.items()}
        self.weights |= {name: read_vector(vector) for name, vector in model.vectors.items()}
        self.embedding = read_tensor(model.embedding)
        self.cache = TorchCache(
            config.num_layers,
            ctx,
            config.num_kv_heads,
            config.cache_dims,
            [torch.float32] * len(config.cache_dims),
            torch.device("cpu"),
        )

    def logits(self, tokens: list[int], start: int = 0, rows: list[int] | None = None) -> torch.Tensor:
        """Logits of `rows` of the batch (all of them by default), which begins at position `start`."""
        positions = Positions(torch.arange(start, start + len(tokens)), start + len(tokens))
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
        routed = ops.routed[layer]
        for number in routed.experts.unique().tolist():
            products = [partial(multiply, matrix) for matrix in read_expert(experts, number)]
            tokens, ranks = torch.where(routed.experts == number)
            routed.returned[tokens, ranks] = ops.experts(experts, number, routed.x[tokens], products)


def multiply(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A product with a plain matrix."""
    return x @ matrix.T


def read_expert(layer: ExpertLayer, number: int) -> list[torch.Tensor]:
    """An expert's matrices, however the file holds them."""
    if layer.stored is None:
        return [read_tensor(matrix) for matrix in layer.experts[number]]
    parts = [np.frombuffer(read_bytes(extent), np.uint8) for extent in layer.stored.extents[number]]
    unpacked = unpack(layer.stored, parts, layer.experts[number])
    return [
        dequantize(torch.from_numpy(values.copy()), matrix.element, matrix.shape)
        for values, matrix in zip(unpacked, layer.experts[number], strict=True)
    ]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the range of the expected logits."""
    spread = float(expected.max() - expected.min())
    assert math.isfinite(spread) and spread > 0
    return float((actual - expected).abs().max()) / spread
