"""The operations for one token after the other, on tensors that stay where they are.

A graph of kernels reads and writes the same memory each time it is replayed, and no Python runs beside it. So what goes into
a run of stages, and what is read after it, lies here, and position and hidden state are tensors on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

import torch

from offload.config import KV_BUCKET
from offload.kernels.torch.cache import TorchCache
from offload.kernels.torch.ops import TorchOps
from offload.kernels.torch.positions import Positions
from offload.kernels.torch.products import Products
from offload.kernels.torch.routing import Weights
from offload.models.base import Model
from offload.units import MIB, align_up

POOL_SLACK_BYTES: Final = 64 * MIB
"""Of a pool of graphs: torch's allocator takes 2 and 20 MiB at once, and gives cuBLAS 32 MiB on Hopper, elsewhere less."""


class TokenOps(TorchOps):
    """See the module. Choices of the last token that came past a router stay until the next one's.

    Attributes:
        positions: that of the token. logits: parts of them, by stage.
    """

    def __init__(
        self, weights: Weights, cache: TorchCache, ctx: int, device: torch.device,
        product: Callable[[torch.Tensor, str], torch.Tensor],
    ) -> None:  # fmt: skip
        at, row = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self.positions = Positions(at, ctx, cache.loads)
        on_host = Positions(torch.zeros(1, dtype=torch.int64), ctx) if cache.on_host else None
        super().__init__(weights, cache, self.positions, row, product, on_host)
        self.logits: dict[int, torch.Tensor] = {}
        self._ctx = ctx
        self._device = device
        self._kept: dict[Hashable, torch.Tensor] = {}

    def begin(self, position: int, hidden: torch.Tensor) -> torch.Tensor:
        """The next token's hidden state [1, hidden_size], where it stays; `positions.refresh` has still to be called."""
        for positions in (self.positions, self._host_positions):
            if positions is not None:
                positions.at.fill_(position)
                positions.first, positions.length = position, kv_length(position, self._ctx)
        if self._host_positions is not None:
            self._host_positions.refresh()
        return self.keep("hidden", hidden)

    def keep(self, name: Hashable, value: torch.Tensor) -> torch.Tensor:
        if name not in self._kept:
            self._kept[name] = torch.empty_like(value, device=self._device)
        return self._kept[name].copy_(value)

    def mix(self, layer: int) -> torch.Tensor:
        return self.routed[layer].mixed()


def kv_length(position: int, ctx: int) -> int:
    """How many positions a single token attends to, masked ones included: kernels stay the same for `KV_BUCKET` tokens."""
    return min(ctx, align_up(position + 1, KV_BUCKET))


def graph_nbytes(model: Model, ctx: int, products: Products) -> int:
    """An upper bound of what graphs of one token take beside what passes take: their pool, and what stays where it is.

    One pool serves all graphs, and none runs beside another: it grows to what the largest piece needs at a time. What a
    driver keeps for the nodes of a graph is not in it.
    """
    config, layers = model.config, model.experts.values()
    kinds = (info for info in model.matrices.values() if len(info.shape) > 2 or products.decodes(info.element))
    decoded = 4 * max((info.num_elements for info in kinds), default=0)
    features = 6 * config.hidden_size + 4 * config.intermediate_size + 3 * config.num_heads * ctx
    past = 2 * ctx * sum(config.cache_widths)
    masks = 4 * ctx * len(set(config.sliding_windows))
    choices = sum((layer.num_used + 1) * config.hidden_size + 4 * len(layer.experts) for layer in layers)
    return 3 * decoded + 4 * (features + past + masks + choices + config.vocab_size) + POOL_SLACK_BYTES
