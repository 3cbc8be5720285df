"""`Products` by Triton's kernels; types that have none are decoded in torch operations."""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

from offload.elements import ElementType
from offload.kernels.torch.products import DecodedProducts
from offload.kernels.triton import kernels

FEW_TOKENS: Final = 8
"""Up to here each token reads the bytes anew, mostly from the card's cache; beyond, values are written once for all."""


class TritonProducts:
    """See the module.

    Args:
        dtype: in which products with many tokens are computed; sums are float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._decoded = DecodedProducts()

    def product(self, x: torch.Tensor, raw: torch.Tensor, element: ElementType, shape: tuple[int, int]) -> torch.Tensor:
        if element.name not in kernels.SUPPORTED:
            return self._decoded.product(x, raw, element, shape)
        if x.shape[0] <= FEW_TOKENS:
            return kernels.product(x, raw, element, shape)
        return functional.linear(x.to(self._dtype), kernels.values(raw, element, shape, self._dtype)).float()

    def values(self, raw: torch.Tensor, element: ElementType, shape: tuple[int, ...]) -> torch.Tensor:
        if element.name not in kernels.SUPPORTED:
            return self._decoded.values(raw, element, shape)
        return kernels.values(raw, element, shape)

    def decodes(self, element: ElementType) -> bool:
        return element.name not in kernels.SUPPORTED
