"""Softmax attention over keys and values of past positions, by torch's fused kernels where they know the kind.

Query heads that share a key are never given a copy of it each. Legend: S heads of keys, G query heads to each, T tokens,
L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

from offload.kernels.ops import Attention
from offload.models.base import Model
from offload.units import MIB, PAGE

SCORES_BYTES: Final = 64 * MIB
"""Of scores computed at once, where no fused kernel does without them."""
FUSED_BLOCK: Final = (64, 512)  # queries and keys that a thread of torch's fused kernel for the CPU takes at once


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
    if attention.softcap is not None or sinks is not None:
        k, v = k.float(), v.float()
        mixed = _in_parts(q, mask, lambda part, rows: _by_hand(part, k, v, rows, attention, sinks))
    elif k.device.type == "cpu" and k.shape[-1] != v.shape[-1]:  # which its fused kernel does not know
        mixed = _in_parts(q, mask, lambda part, rows: _fused(part, k, v, rows, attention.scale))
    else:
        mixed = _fused(q, k, v, mask, attention.scale)
    return mixed.permute(2, 0, 1, 3).flatten(1).float()


def _in_parts(
    q: torch.Tensor, mask: torch.Tensor, attended: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What `attended` gives for so many tokens at a time that their scores are few."""
    count = max(1, SCORES_BYTES // (4 * q.shape[0] * q.shape[1] * (mask.shape[1] + 1)))
    parts = zip(torch.split(q, count, dim=2), torch.split(mask, count), strict=True)
    return torch.cat([attended(part, rows) for part, rows in parts], dim=2)


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


def host_attention_nbytes(model: Model, ctx: int, rows: int, threads: int) -> int:
    """The same for a cache in host memory: a layer's past in float32, what crosses and its like, pages that layers leave
    unused, and scores, of which torch's fused kernel for the CPU needs a block for each thread."""
    config = model.config
    dims, value_dim = config.cache_dims, config.value_dim or config.head_dim
    past = 4 * ctx * config.num_kv_heads * (dims[0] + dims[-1])
    crossing = 4 * rows * (config.num_heads * (config.head_dim + value_dim) + 2 * sum(config.cache_widths))
    queries, keys = FUSED_BLOCK
    token = 4 * config.num_heads * (ctx + 1)
    scores = 4 * min(rows * token, SCORES_BYTES + token)
    if value_dim != config.head_dim:
        past *= 2  # and a copy, in the order that products take
    elif all(kind.softcap is None and kind.sinks is None for kind in model.attentions):
        scores = 4 * threads * queries * (keys + value_dim + 2)
    return past + 3 * crossing + scores + config.num_layers * len(dims) * PAGE
