"""Which experts a token is sent to, and what they made of it: the part of `Ops` that layers with experts add, in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from offload.kernels.ops import Routing

Weights = Callable[[str], torch.Tensor]


class Routed(NamedTuple):
    """A choice that waits for its experts.

    Attributes:
        x: [num_tokens, hidden_size], what the experts get.
        experts: int64 [num_tokens, num_used], best first. weights: float32, of the same shape.
        returned: [num_tokens, num_used, hidden_size], filled as experts are computed.
    """

    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    returned: torch.Tensor

    def fill(self, pairs: torch.Tensor, results: torch.Tensor) -> None:
        """Keeps what was returned for pairs of token and rank, int64 [n] of token * num_used + rank."""
        self.returned.view(-1, self.returned.shape[-1]).index_copy_(0, pairs, results)

    def mixed(self) -> torch.Tensor:
        """The weighted sum, in the order of the choice."""
        weighted = self.returned * self.weights[..., None]
        total = weighted[:, 0]
        for rank in range(1, weighted.shape[1]):
            total = total + weighted[:, rank]
        return total


def choose(x: torch.Tensor, routing: Routing, weights: Weights) -> Routed:
    """Routes x [num_tokens, hidden_size]; see `Routing`."""
    scores, compared = _compared(x, routing, weights)
    chosen = compared.topk(routing.num_used, dim=-1).indices
    mix = scores.gather(1, chosen)
    if routing.scoring == "softmax_of_chosen":
        mix = mix.softmax(-1)
    if routing.normalise:
        mix = mix / mix.sum(-1, keepdim=True).clamp_min(
            2.0**-14
        )  # as llama.cpp: the smallest normal half-precision number
    return Routed(x, chosen, mix * routing.scale, x.new_zeros((*chosen.shape, x.shape[1])))


def rank(x: torch.Tensor, routing: Routing, weights: Weights) -> torch.Tensor:
    """All experts, best first, int64 [num_tokens, num_experts]."""
    _, compared = _compared(x, routing, weights)
    return compared.argsort(dim=-1, descending=True, stable=True)


def _compared(x: torch.Tensor, routing: Routing, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [num_tokens, num_experts], and what experts are compared by."""
    bias = None if routing.bias is None else weights(routing.bias)
    scores = _scores(torch.nn.functional.linear(x, weights(routing.router), bias), routing)
    compared = scores if routing.selection_bias is None else scores + weights(routing.selection_bias)
    return scores, _best_groups(compared, routing)


def _scores(products: torch.Tensor, routing: Routing) -> torch.Tensor:
    if routing.scoring == "softmax":
        return products.softmax(-1)
    return products.sigmoid() if routing.scoring == "sigmoid" else products


def _best_groups(scores: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The scores, with those outside of the best groups at minus infinity."""
    if routing.num_groups == 1:
        return scores
    grouped = scores.reshape(scores.shape[0], routing.num_groups, -1)
    best = grouped.topk(routing.group_top, dim=-1).values.sum(-1).topk(routing.groups_used, dim=-1).indices
    outside = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
    return grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)
