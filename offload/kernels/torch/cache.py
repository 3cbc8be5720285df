"""Keys and values of past positions, as torch tensors: of some layers on a device, of the others in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import prod
from typing import Final

import torch

from offload.elements import BF16, F16, F32, ElementType
from offload.tiers.device_errors import allocating
from offload.tiers.ram import Slab
from offload.units import align_up

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
        on_host: layers in host memory.

    Attributes:
        loads: type of what `load` gives of layers on the device: on CUDA, whose kernels read any, that stored if it is one;
            elsewhere, as of all layers in host memory, float32.

    Raises:
        AllocationError: the device or the host has no such room.
    """

    def __init__(
        self, num_layers: int, ctx: int, num_kv_heads: int, dims: Sequence[int],
        dtypes: Sequence[torch.dtype], device: torch.device, on_host: AbstractSet[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.on_host = on_host
        kinds = list(zip(dims, dtypes, strict=True))
        is_one = len({dtype for _, dtype in kinds}) == 1
        self.loads = kinds[0][1] if is_one and device.type == "cuda" else torch.float32
        here = [layer for layer in range(num_layers) if layer not in on_host]
        rows = (len(here), ctx, num_kv_heads)
        nbytes = prod(rows) * sum(dim * dtype.itemsize for dim, dtype in kinds)
        with allocating(device, nbytes, "the KV cache", "lower --ctx or --vram"):
            kept = [torch.zeros((*rows, dim), dtype=dtype, device=device) for dim, dtype in kinds]
        self.nbytes = sum(tensor.nbytes for tensor in kept)
        self._layers = {layer: [tensor[place] for tensor in kept] for place, layer in enumerate(here)}
        self._loaded: list[torch.Tensor] = []
        self._slab: Slab | None = None
        if on_host:
            self._keep_on_host(sorted(on_host), (ctx, num_kv_heads), kinds)

    def _keep_on_host(
        self, layers: Sequence[int], shape: tuple[int, int], kinds: Sequence[tuple[int, torch.dtype]]
    ) -> None:
        """One layer's past in float32, where it is not kept so, has a place of its own: a fresh one would be page faults."""
        if any(dtype != torch.float32 for _, dtype in kinds):
            self._loaded = [torch.empty(prod(shape) * dim) for dim, _ in (kinds[0], kinds[-1])]
        sizes = [prod(shape) * dim * dtype.itemsize for dim, dtype in kinds]
        self._slab = Slab(len(layers) * sum(align_up(size) for size in sizes))
        start = 0
        for layer in layers:
            self._layers[layer] = []
            for size, (dim, dtype) in zip(sizes, kinds, strict=True):
                raw = torch.frombuffer(self._slab.view(start, size), dtype=torch.uint8)
                self._layers[layer].append(raw.view(dtype).view(*shape, dim))
                start += align_up(size)

    def store(self, layer: int, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps key and value [num_tokens, num_kv_heads, features] at `positions` (int64 [num_tokens]); all of them lie
        where the layer does."""
        for kept, fresh in zip(self._layers[layer], (key, value), strict=False):
            kept.index_copy_(0, positions, fresh.to(kept.dtype))

    def rows(self, layer: int, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Positions `[start, stop)` as stored, [positions, num_kv_heads, features] for each tensor: views."""
        return tuple(kept[start:stop] for kept in self._layers[layer])

    def load(self, layer: int, length: int, value_dim: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of positions `start` to length - 1, [positions, num_kv_heads, features]; of a layer in host memory
        until the next `load`."""
        kept = self._layers[layer]
        past = kept[0][start:length], kept[-1][start:length, :, :value_dim]
        if layer not in self.on_host:
            return past[0].to(self.loads), past[1].to(self.loads)
        if not self._loaded:
            return past
        keys, values = (room[: part.numel()].view(part.shape) for room, part in zip(self._loaded, past, strict=True))
        return keys.copy_(past[0]), values.copy_(past[1])

    def close(self) -> None:
        """Gives all memory back. Idempotent."""
        self._layers, self._loaded = {}, []
        if self._slab is not None:
            self._slab.close()
