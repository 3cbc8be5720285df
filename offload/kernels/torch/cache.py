"""Keys and values of past positions, as torch tensors on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Final

import torch

from offload.elements import BF16, F16, F32, ElementType
from offload.tiers.device_errors import allocating

DTYPES: Final[Mapping[ElementType, torch.dtype]] = {F16: torch.float16, BF16: torch.bfloat16, F32: torch.float32}
"""What a cache can hold: types that attention computes with, so that nothing has to be decoded first."""


class TorchCache:
    """One key and one value tensor for each layer, [ctx, num_kv_heads, features of a head].

    Positions that nothing was stored at hold zeros, and those after a conversation was cut what it held there: finite
    numbers both, which a mask can hide.

    Args:
        dims: features of a head of keys and of values; only of keys, where values are their leading features.
        ctx: positions that fit, 0 to ctx - 1.
        dtypes: of each, what is stored; rounding happens in `store`.

    Attributes:
        loads: type of what `load` gives: on CUDA, whose kernels read any, the one stored if it is one; else float32.

    Raises:
        AllocationError: the device has no such room.
    """

    def __init__(
        self, num_layers: int, ctx: int, num_kv_heads: int, dims: Sequence[int],
        dtypes: Sequence[torch.dtype], device: torch.device,
    ) -> None:  # fmt: skip
        rows = (num_layers, ctx, num_kv_heads)
        kinds = list(zip(dims, dtypes, strict=True))
        nbytes = prod(rows) * sum(dim * dtype.itemsize for dim, dtype in kinds)
        with allocating(device, nbytes, "the KV cache", "lower --ctx or --vram"):
            self._kept = [torch.zeros((*rows, dim), dtype=dtype, device=device) for dim, dtype in kinds]
        is_one = len({dtype for _, dtype in kinds}) == 1
        self.loads = kinds[0][1] if is_one and device.type == "cuda" else torch.float32

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
