from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from support.devices import torch_runs_on, triton_runs_on

from offload.kernels.torch.products import DecodedProducts, Products


class Multiplier(NamedTuple):
    """What multiplies by stored matrices, and where."""

    products: Products
    device: str


@pytest.fixture(
    scope="module",
    params=[
        "decoded cpu",
        pytest.param("decoded cuda", marks=pytest.mark.gpu),
        "triton cpu",
        pytest.param("triton cuda", marks=pytest.mark.gpu),
    ],
)
def multiplier(request: pytest.FixtureRequest) -> Multiplier:
    """Both kinds of products, everywhere. Those of Triton are in float32."""
    kind, device = request.param.split()
    if kind == "decoded":
        return Multiplier(DecodedProducts(), torch_runs_on(device))
    pytest.importorskip("triton", reason="triton is for Linux only")
    from offload.kernels.triton.products import TritonProducts

    return Multiplier(TritonProducts(torch.float32), triton_runs_on(device))
