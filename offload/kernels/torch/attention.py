"""Softmax attention over keys and values of past positions, by torch's fused kernels where they know the kind.

Query heads that share a key are never given a copy of it each. Legend: S heads of keys, G query heads to each, T tokens,
L positions.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from offload.kernels.ops import Attention
from offload.models.base import Model
from offload.units import PAGE


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, attention: Attention,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Float32 [T, S * G * value_dim].

    Args:
        query: float32 [T, S * G, head_dim]. keys: [L, S, head_dim]. values: [L, S, value_dim], of the same type.
        mask: [T, L], added to scores. What it hides adds exactly nothing, so long as it is finite.
        sinks: float32 [S * G], see `Attention`; or None.
    """
    q = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[2]).permute(1, 2, 0, 3)
    k, v = keys.transpose(0, 1), values.transpose(0, 1)
    if attention.softcap is None and sinks is None:
        mixed = _fused(q, k, v, mask, attention.scale)
    else:
        mixed = _by_hand(q, k.float(), v.float(), mask, attention, sinks)
    return mixed.permute(2, 0, 1, 3).flatten(1).float()


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """[S, G, T, value_dim]; in the type of keys, float32 inside."""
    q = q.to(k.dtype)
    if q.shape[2] == 1:  # the heads of a group are rows of one product, as tokens would be
        rows = mask.expand(q.shape[1], -1)
        return functional.scaled_dot_product_attention(q[None, :, :, 0], k[None], v[None], rows, scale=scale)[
            0
        ].unsqueeze(2)
    k, v = (past[:, None].expand(-1, q.shape[1], -1, -1) for past in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, attention: Attention,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The same in float32, for what no fused kernel of torch knows: soft caps and sinks."""
    groups = q.shape[:3]
    scores = (q.flatten(1, 2) @ k.transpose(1, 2)).reshape(*groups, -1) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.reshape(*groups[:2], 1, 1).expand(*groups, 1)), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    mixed = weights.flatten(1, 2) @ v
    return mixed.reshape(*groups, -1)


def device_attention_nbytes(model: Model, ctx: int, rows: int) -> int:
    """An upper bound of what attention of so many tokens takes on a device beside the cache: scores, and a layer's past in
    float32 where no fused kernel takes it as stored."""
    config = model.config
    return 12 * rows * config.num_heads * ctx + 8 * ctx * sum(config.cache_widths)


def host_attention_nbytes(model: Model, ctx: int, rows: int) -> int:
    """The same for a cache in host memory: a layer's past in float32, what crosses and its like, pages that layers leave
    unused, and scores where torch's fused kernel for the CPU does not know the kind."""
    config = model.config
    dims, value_dim = config.cache_dims, config.value_dim or config.head_dim
    past = 4 * ctx * config.num_kv_heads * (dims[0] + dims[-1])
    crossing = 4 * rows * (config.num_heads * (config.head_dim + value_dim) + 2 * sum(config.cache_widths))
    known = value_dim == config.head_dim and all(a.softcap is None and a.sinks is None for a in model.attentions)
    scores = 0 if known else 4 * rows * config.num_heads * (ctx + 1)
    return past + 3 * crossing + 4 * scores + config.num_layers * len(dims) * PAGE
