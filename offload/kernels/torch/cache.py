"""Keys and values of past positions, as torch tensors on one device."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from offload.tiers.device_errors import allocating


class TorchCache:
    """One key and one value tensor for each layer, [ctx, num_kv_heads, features of a head].

    Positions that nothing was stored at hold zeros, and those after a conversation was cut what it held there: finite
    numbers both, which a mask can hide.

    Args:
        dims: features of a head of keys and of values; only of keys, where values are their leading features.
        ctx: positions that fit, 0 to ctx - 1.
        dtype: type of what is stored; rounding happens in `store`.

    Attributes:
        loads: type of what `load` gives: on CUDA, whose kernels read any, the one stored; elsewhere float32.

    Raises:
        AllocationError: the device has no such room.
    """

    def __init__(
        self, num_layers: int, ctx: int, num_kv_heads: int, dims: Sequence[int], dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        rows = (num_layers, ctx, num_kv_heads)
        with allocating(device, prod(rows) * sum(dims) * dtype.itemsize, "the KV cache", "lower --ctx or --vram"):
            self._kept = [torch.zeros((*rows, dim), dtype=dtype, device=device) for dim in dims]
        self.loads = dtype if device.type == "cuda" else torch.float32

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    def store(self, layer: int, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps key and value [num_tokens, num_kv_heads, features] at `positions` (int64 [num_tokens], on the device)."""
        for kept, fresh in zip(self._kept, (key, value), strict=False):
            kept[layer].index_copy_(0, positions, fresh.to(kept.dtype))

    def rows(self, layer: int, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Positions `[start, stop)` as stored, [positions, num_kv_heads, features] for each tensor: views."""
        return tuple(kept[layer, start:stop] for kept in self._kept)

    def load(self, layer: int, length: int, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of positions 0 to length - 1, [length, num_kv_heads, features]."""
        keys, values = self._kept[0][layer, :length], self._kept[-1][layer, :length, :, :value_dim]
        return keys.to(self.loads), values.to(self.loads)
