"""`Products` by Triton's kernels; types that have none are decoded in torch operations."""

from __future__ import annotations

import torch
from torch.nn import functional

from offload.elements import ElementType
from offload.kernels.torch.products import FEW_TOKENS, DecodedProducts
from offload.kernels.torch.scales import BlockScales
from offload.kernels.triton import kernels


class TritonProducts:
    """See the module.

    Args:
        dtype: in which products with many tokens are computed; sums are float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._decoded = DecodedProducts()

    def product(
        self, x: torch.Tensor, raw: torch.Tensor, element: ElementType, shape: tuple[int, int],
        scales: BlockScales | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if element.name not in kernels.SUPPORTED:
            return self._decoded.product(x, raw, element, shape, scales)
        if x.shape[0] <= FEW_TOKENS:
            return kernels.product(x, raw, element, shape, scales)
        return functional.linear(x.to(self._dtype), kernels.values(raw, element, shape, self._dtype, scales)).float()

    def expert_products(
        self, x: torch.Tensor, slots: torch.Tensor, bank: torch.Tensor, offset: int, stride: int, element: ElementType,
        shape: tuple[int, int], scales: BlockScales | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if element.name not in kernels.SUPPORTED:
            return self._decoded.expert_products(x, slots, bank, offset, stride, element, shape, scales)
        return kernels.expert_products(x, slots, bank, offset, stride, element, shape, scales)

    def values(
        self, raw: torch.Tensor, element: ElementType, shape: tuple[int, ...], scales: BlockScales | None = None
    ) -> torch.Tensor:
        if element.name not in kernels.SUPPORTED:
            return self._decoded.values(raw, element, shape, scales)
        return kernels.values(raw, element, shape, scales=scales)

    def decodes(self, element: ElementType) -> bool:
        return element.name not in kernels.SUPPORTED
