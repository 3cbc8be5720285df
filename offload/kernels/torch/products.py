"""Products with stored matrices: decoded first, or straight from their bytes by kernels of the device.

Legend: matrices are [out_features, in_features] as `x @ matrix.T` wants them, stored as uint8 in some element type, those in
FP8 with scales. Activations are float32 whatever the matrix is.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final, Protocol

import torch
from torch.nn import functional

from offload.elements import F8_E4M3, ElementType
from offload.kernels.torch.dequantize import dequantize
from offload.kernels.torch.scales import BlockScales

FEW_TOKENS: Final = 8
"""Up to here each token reads the bytes anew, mostly from the card's cache; beyond, values are written once for all."""


class Products(Protocol):
    """See the module."""

    def product(
        self, x: torch.Tensor, raw: torch.Tensor, element: ElementType, shape: tuple[int, int],
        scales: BlockScales | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`x @ matrix.T`, float32 [tokens, out_features], of x float32 [tokens, in_features]."""
        ...

    def expert_products(
        self, x: torch.Tensor, slots: torch.Tensor, bank: torch.Tensor, offset: int, stride: int, element: ElementType,
        shape: tuple[int, int], scales: BlockScales | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Each row by a matrix of its own, float32 [chosen, out_features]; a result depends on its own row and slot only.

        Nothing is asked of the host, which may not know the slots.

        Args:
            x: float32 [chosen, in_features], or [1, in_features] for all of them. slots: int32 [chosen], on the device.
            bank: uint8, slots of `stride` bytes in which the matrix begins at `offset`; they may overlap.
            scales: a grid for each of the chosen.
        """
        ...

    def values(
        self, raw: torch.Tensor, element: ElementType, shape: tuple[int, ...], scales: BlockScales | None = None
    ) -> torch.Tensor:
        """What is stored, float32."""
        ...

    def decodes(self, element: ElementType, /) -> bool:
        """Whether the product of one token has all values written out first."""
        ...


class DecodedProducts:
    """Decodes in plain torch operations, on any device."""

    def product(
        self, x: torch.Tensor, raw: torch.Tensor, element: ElementType, shape: tuple[int, int],
        scales: BlockScales | None = None,
    ) -> torch.Tensor:  # fmt: skip
        return functional.linear(x, self.values(raw, element, shape, scales))

    def expert_products(
        self, x: torch.Tensor, slots: torch.Tensor, bank: torch.Tensor, offset: int, stride: int, element: ElementType,
        shape: tuple[int, int], scales: BlockScales | None = None,
    ) -> torch.Tensor:  # fmt: skip
        nbytes = shape[0] * element.row_bytes(shape[1])
        count = (bank.numel() - offset - nbytes) // stride + 1
        matrices = bank.as_strided((count, nbytes), (stride, 1), bank.storage_offset() + offset)
        rows = x.expand(slots.numel(), -1)
        own = [scales and scales._replace(grid=scales.grid[i]) for i in range(slots.numel())]
        return torch.cat(
            [
                self.product(rows[i : i + 1], matrices.index_select(0, slots[i : i + 1])[0], element, shape, own[i])
                for i in range(slots.numel())
            ]
        )

    def values(
        self, raw: torch.Tensor, element: ElementType, shape: tuple[int, ...], scales: BlockScales | None = None
    ) -> torch.Tensor:
        assert (element == F8_E4M3) == (scales is not None), element
        values = dequantize(raw, element, shape)
        return values if scales is None else scales.apply(values)

    def decodes(self, _element: ElementType) -> bool:
        return True


def products_for(device: torch.device) -> Products:
    """What suits the device: Triton's kernels on a CUDA device where Triton is installed, as it is with torch on Linux."""
    if device.type != "cuda" or find_spec("triton") is None:
        return DecodedProducts()
    from offload.kernels.triton.products import TritonProducts

    return TritonProducts(_matmul_dtype(device))


def _matmul_dtype(device: torch.device) -> torch.dtype:
    """For products with many tokens: what tensor cores take, with float32's range if they can."""
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16
