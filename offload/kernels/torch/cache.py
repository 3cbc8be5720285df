"""Keys and values of past positions, as torch tensors on one device."""

from __future__ import annotations

import torch


class TorchCache:
    """One key and one value tensor for each layer, [ctx, num_kv_heads, head_dim].

    Args:
        ctx: positions that fit, 0 to ctx - 1.
        dtype: type of what is stored; rounding happens in `store`.
    """

    def __init__(
        self, num_layers: int, ctx: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_layers, ctx, num_kv_heads, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def store(self, layer: int, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps key and value [num_tokens, num_kv_heads, head_dim] at `positions` (int64 [num_tokens])."""
        self._keys[layer, positions] = key.to(self._keys.dtype)
        self._values[layer, positions] = value.to(self._values.dtype)

    def load(self, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of positions 0 to length - 1, float32 [length, num_kv_heads, head_dim]."""
        return self._keys[layer, :length].float(), self._values[layer, :length].float()
