"""The operations on torch tensors, executed as they are called, in float32, on whatever device the tensors are.

Knows no quantization (weights arrive as float32) and no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final

import torch
from torch.nn import functional

from offload.kernels.ops import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation, Attention, Ops, Rope, Routing
from offload.kernels.torch.cache import TorchCache
from offload.kernels.torch.routing import Routed, Weights, choose, rank
from offload.models.base import ExpertLayer

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
        positions: int64 [num_tokens]; all from 0 to the largest must be in the cache or in the batch.
        output_rows: int64, rows of the batch whose logits are asked for.

    Attributes:
        routed: by layer, the choices whose experts have still to be computed. chosen: what was chosen, by layer.
        foreseen: by layer and how many layers before, all experts in the order in which they were guessed.
    """

    def __init__(
        self, weights: Weights, cache: TorchCache, positions: torch.Tensor, output_rows: torch.Tensor,
        product: Callable[[torch.Tensor, str], torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._weights = weights
        self._product = product or (lambda x, name: functional.linear(x, weights(name)))
        self._cache = cache
        self._positions = positions
        self._output_rows = output_rows
        self._length = int(positions.max()) + 1
        self._rotations: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[int | None, torch.Tensor] = {}
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
        cos, sin = self._rotation(rope)
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
        self._cache.store(attention.layer, self._positions, key, value)
        keys, values = self._cache.load(attention.layer, self._length, value.shape[-1])
        group = query.shape[1] // keys.shape[1]
        q = query.transpose(0, 1)
        k, v = (past.transpose(0, 1).repeat_interleave(group, dim=0) for past in (keys, values))
        mask = self._mask(attention.window)
        if attention.softcap is None and attention.sinks is None:
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scale)
        else:
            scores = q @ k.transpose(1, 2) * attention.scale
            if attention.softcap is not None:
                scores = self.softcap(scores, attention.softcap)
            scores = scores.masked_fill(~mask, -torch.inf)
            if attention.sinks is not None:
                sinks = self._weights(attention.sinks)[:, None, None].expand(-1, scores.shape[1], 1)
                scores = torch.cat((scores, sinks), dim=-1)
            mixed = scores.softmax(-1)[..., : v.shape[1]] @ v
        return mixed.transpose(0, 1).flatten(1)

    def glu(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        if activation == "swiglu_oai":
            gate = gate.clamp(max=SWIGLU_LIMIT)
            return gate * (gate * SWIGLU_ALPHA).sigmoid() * (up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1)
        return _ACTIVATIONS[activation](gate) * up

    def sigmoid_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x * gate.sigmoid()

    def route(self, x: torch.Tensor, routing: Routing) -> None:
        self.routed[routing.layer] = choose(x, routing, self._weights)
        self.chosen[routing.layer] = self.routed[routing.layer].experts

    def foresee(self, x: torch.Tensor, routing: Routing, ahead: int) -> None:
        self.foreseen[routing.layer, ahead] = rank(x, routing, self._weights)

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

    def output_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self._output_rows)

    def _rotation(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every position and frequency, [num_tokens, 1, dims / 2]; the same for all layers."""
        if rope not in self._rotations:
            exponents = torch.arange(0, rope.dims, 2, dtype=torch.float32, device=self._positions.device) / rope.dims
            frequencies = rope.frequency_scale / rope.theta**exponents
            if rope.factors is not None:
                frequencies = frequencies / self._weights(rope.factors)
            angles = self._positions[:, None, None].float() * frequencies
            self._rotations[rope] = angles.cos() * rope.magnitude, angles.sin() * rope.magnitude
        return self._rotations[rope]

    def _mask(self, window: int | None) -> torch.Tensor:
        """True where a query [num_tokens] sees a key [length]; the same for all layers of one window."""
        if window not in self._masks:
            distance = self._positions[:, None] - torch.arange(self._length, device=self._positions.device)
            seen = distance >= 0
            self._masks[window] = seen if window is None else seen & (distance < window)
        return self._masks[window]


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias
