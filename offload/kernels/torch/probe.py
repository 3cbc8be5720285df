"""Measures a device's memory, and its products with stored matrices by element type."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from offload.elements import F8_E4M3, ElementType, element_type
from offload.kernels.torch.products import Products, products_for
from offload.kernels.torch.scales import BlockScales
from offload.units import MIB

TYPES: Final = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4", "F8_E4M3", "F16", "BF16")
ROWS, COLUMNS = 16384, 8192  # of the matrix: more bytes than a card's cache holds, in every type
_REPETITIONS: Final = 20
_COPY_BYTES: Final = 256 * MIB


def measure_memory(device: torch.device, nbytes: int = _COPY_BYTES) -> float:
    """Bytes per second of a copy within the device's memory, read and written."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds(lambda: target.copy_(source), device)


def measure_products(
    device: str | torch.device, names: Sequence[str] = TYPES, rows: int = ROWS, columns: int = COLUMNS
) -> Iterator[tuple[str, float]]:
    """For each element type the bytes of the matrix over the time of its product with one token."""
    products, x = products_for(torch.device(device)), torch.randn(1, columns, device=device)
    for name in names:
        yield name, _product_bps(products, x, element_type(name), rows)


def _product_bps(products: Products, x: torch.Tensor, element: ElementType, rows: int) -> float:
    nbytes = rows * element.row_bytes(x.shape[1])
    # any bytes are some matrix; below 100 no scale of any type is infinite
    raw = torch.randint(0, 100, (nbytes,), dtype=torch.uint8, device=x.device)
    scales = BlockScales(torch.ones(1, 1, device=x.device), rows, x.shape[1]) if element == F8_E4M3 else None
    repetitions = _REPETITIONS if x.device.type == "cuda" else 1  # the stand-in decodes, which takes seconds
    return nbytes / seconds(
        lambda: products.product(x, raw, element, (rows, x.shape[1]), scales), x.device, repetitions
    )


def seconds(work: Callable[[], object], device: torch.device, repetitions: int = _REPETITIONS) -> float:
    """Of one run, when many follow each other."""
    work()
    wait_for(device)
    start = time.perf_counter()
    for _ in range(repetitions):
        work()
    wait_for(device)
    return (time.perf_counter() - start) / repetitions


def wait_for(device: torch.device) -> None:
    """Until all that was started there has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
