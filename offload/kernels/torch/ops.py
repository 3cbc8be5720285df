"""The operations on torch tensors, executed as they are called, in float32, on whatever device the tensors are.

Knows no quantization (weights arrive as float32) and no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Final

import torch
from torch.nn import functional

from offload.kernels.ops import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation, Attention, Ops, Rope, Routing
from offload.kernels.torch.attention import attend
from offload.kernels.torch.cache import TorchCache
from offload.kernels.torch.positions import Positions
from offload.kernels.torch.routing import Routed, Weights, choose, rank
from offload.kernels.torch.scales import BlockScales, scales_of
from offload.models.base import ExpertLayer
from offload.models.checkpoint.base import TensorInfo

_ACTIVATIONS: Final[dict[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class TorchOps(Ops[torch.Tensor]):
    """One batch on one device.

    Args:
        weights: gives a matrix [out_features, in_features] or a vector by name, float32.
        product: multiplies by a matrix, `product(x, name)`; left out, its values are multiplied.
        cache: holds the positions before those of the batch; the batch's own are added to it.
        positions: where the tokens stand; all from 0 to the largest must be in the cache or in the batch.
        host_positions: the same in host memory, where the cache keeps layers there.
        output_rows: int64, rows of the batch whose logits are asked for.

    Attributes:
        routed: by layer, the choices whose experts have still to be computed. chosen: what was chosen, by layer.
        foreseen: by layer and how many layers before, all experts in the order in which they were guessed.
    """

    def __init__(
        self, weights: Weights, cache: TorchCache, positions: Positions, output_rows: torch.Tensor,
        product: Callable[[torch.Tensor, str], torch.Tensor] | None = None, host_positions: Positions | None = None,
    ) -> None:  # fmt: skip
        self._weights = weights
        self._product = product or (lambda x, name: functional.linear(x, weights(name)))
        self._cache = cache
        self._positions = positions
        self._host_positions = host_positions
        self._output_rows = output_rows
        self.routed: dict[int, Routed] = {}
        self.chosen: dict[int, torch.Tensor] = {}
        self.foreseen: dict[tuple[int, int], torch.Tensor] = {}

    def linear(self, x: torch.Tensor, weight: str, bias: str | None = None) -> torch.Tensor:
        return _biased(self._product(x, weight), None if bias is None else self._weights(bias))

    def rms_norm(self, x: torch.Tensor, weight: str | None, eps: float) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return normed if weight is None else normed * self._weights(weight)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def softcap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return cap * torch.tanh(x / cap)

    def split(self, x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        ends = list(accumulate(sizes))
        return tuple(x[..., end - size : end] for size, end in zip(sizes, ends, strict=True))

    def heads(self, x: torch.Tensor, num_heads: int) -> torch.Tensor:
        return x.reshape(*x.shape[:-1], num_heads, -1)

    def concat(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat((a, b.expand(-1, a.shape[1], -1)), dim=-1)

    def linear_heads(self, x: torch.Tensor, weight: str) -> torch.Tensor:
        return torch.einsum("thi,hoi->tho", x, self._weights(weight))

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)

    def rope(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        cos, sin = self._positions.rotation(rope, self._weights)
        rotated, rest = x[..., : rope.dims], x[..., rope.dims :]
        if rope.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, dim=-1)
        pair = (first * cos - second * sin, first * sin + second * cos)
        turned = torch.stack(pair, dim=-1).flatten(-2) if rope.interleaved else torch.cat(pair, dim=-1)
        return torch.cat((turned, rest), dim=-1)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        layer, window, positions, device = attention.layer, attention.window, self._positions, query.device
        sinks = [] if attention.sinks is None else [self._weights(attention.sinks)]
        if layer in self._cache.on_host:
            assert self._host_positions is not None
            positions = self._host_positions
            query, key, value, *sinks = on_host(query, key, value, *sinks)
        self._cache.store(layer, positions.at, key, value)
        keys, values = self._cache.load(layer, positions.length, value.shape[-1], positions.start(window))
        mixed = attend(query, keys, values, positions.mask(window), attention, *sinks)
        # pageable memory is read before this returns, so nobody need wait
        return mixed.to(device, non_blocking=True)

    def glu(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        if activation == "swiglu_oai":
            gate = gate.clamp(max=SWIGLU_LIMIT)
            return gate * (gate * SWIGLU_ALPHA).sigmoid() * (up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1)
        return _ACTIVATIONS[activation](gate) * up

    def sigmoid_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x * gate.sigmoid()

    def route(self, x: torch.Tensor, routing: Routing) -> None:
        routed = choose(x, routing, self._weights)._asdict()
        self.routed[routing.layer] = Routed(**{name: self.keep((name, routing.layer), routed[name]) for name in routed})
        self.chosen[routing.layer] = self.routed[routing.layer].experts

    def foresee(self, x: torch.Tensor, routing: Routing, ahead: int) -> None:
        ranked = rank(x, routing, self._weights)
        self.foreseen[routing.layer, ahead] = self.keep(("foreseen", routing.layer, ahead), ranked)

    def mix(self, layer: int) -> torch.Tensor:
        return self.routed.pop(layer).mixed()

    def experts(
        self, layer: ExpertLayer, numbers: int | torch.Tensor, x: torch.Tensor,
        products: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    ) -> torch.Tensor:  # fmt: skip
        """What experts return for x, [n, hidden_size].

        Args:
            numbers: the expert of all rows, or of each, int64 [n].
            products: with its gate, up and down matrices, or of each row with those of its own.
        """
        gate, up, down = products
        names = layer.biases or (None, None, None)
        count = len(layer.experts)
        gate_bias, up_bias, down_bias = (
            None if name is None else self._weights(name).reshape(count, -1)[numbers] for name in names
        )
        gated, raised = _biased(gate(x), gate_bias), _biased(up(x), up_bias)
        return _biased(down(self.glu(gated, raised, layer.activation)), down_bias)

    def scales(self, matrix: TensorInfo, numbers: torch.Tensor | None = None) -> BlockScales | None:
        """See `scales_of`."""
        return scales_of(matrix, self._weights, numbers)

    def output_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self._output_rows)

    def keep(self, _name: Hashable, value: torch.Tensor) -> torch.Tensor:
        """What is read after the run of stages that computed it, by the next one or by the host."""
        return value


def on_host(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """They in host memory, float32, in one copy."""
    together = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = torch.split(together, [tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias
