"""Measures a device's memory, its products with stored matrices by element type, attention, and the way to the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import torch

from offload.elements import F8_E4M3, ElementType, KVTypes, element_type
from offload.kernels.torch.attention import attend
from offload.kernels.torch.cache import DTYPES, TorchCache
from offload.kernels.torch.products import Products, products_for
from offload.kernels.torch.scales import BlockScales
from offload.models.base import Model
from offload.units import MIB

TYPES: Final = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4", "F8_E4M3", "F16", "BF16")
ROWS, COLUMNS = 16384, 8192  # of the matrix: more bytes than a card's cache holds, in every type
_REPETITIONS: Final = 20
_COPY_BYTES: Final = 256 * MIB
_PAST_BYTES: Final = 16 * MIB  # of a layer's keys and values
_FEWEST_POSITIONS: Final = 256
_FEWEST_RUNS: Final = 8


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


@torch.inference_mode()
def measure_attentions(model: Model, kv_types: KVTypes, device: str, threads: int) -> tuple[float, float, float]:
    """`measure_attention` by the CPU and on the device, and `measure_crossing`. Where the two are one, so is their speed."""
    dtypes, there = [DTYPES[element] for element in kv_types[: len(model.config.cache_dims)]], torch.device(device)
    host_s = measure_attention(model, dtypes, torch.device("cpu"), threads)
    if there.type == "cpu":
        return host_s, host_s, 0.0
    return host_s, measure_attention(model, dtypes, there, threads), measure_crossing(there)


def measure_attention(model: Model, dtypes: Sequence[torch.dtype], device: torch.device, threads: int) -> float:
    """Seconds that one token spends on one cached position of a layer that lies there, in the model's kind of attention."""
    torch.set_num_threads(threads)
    config, kind = model.config, replace(model.attentions[0], layer=0, window=None)
    heads, value_dim = config.num_kv_heads, config.value_dim or config.head_dim
    row = sum(dtype.itemsize * width for dtype, width in zip(dtypes, config.cache_widths, strict=True))
    length = max(_FEWEST_POSITIONS, _PAST_BYTES // row)
    on_host = frozenset({0} if device.type == "cpu" else ())
    cache = TorchCache(1, length, heads, config.cache_dims, dtypes, device, on_host)
    past = (torch.ones(length, heads, dim, device=device) for dim in (config.head_dim, value_dim))
    cache.store(0, torch.arange(length, device=device), *past)
    query = torch.ones(1, config.num_heads, config.head_dim, device=device)
    mask = torch.zeros(1, length, dtype=torch.float32 if on_host else cache.loads, device=device)
    sinks = None if kind.sinks is None else torch.zeros(config.num_heads, device=device)
    found = best_seconds(lambda: attend(query, *cache.load(0, length, value_dim), mask, kind, sinks), device)
    cache.close()
    return found / length


def measure_crossing(device: torch.device) -> float:
    """Seconds that a few numbers take to host memory and back: what the two have to wait for each other."""
    there = torch.ones(1024, device=device)
    return best_seconds(lambda: there.cpu().to(device), device)


def best_seconds(work: Callable[[], object], device: torch.device, enough_s: float = 0.03) -> float:
    """The shortest of the runs that fit into `enough_s`; others may have shared the processor with somebody."""
    best, runs, end = float("inf"), 0, time.perf_counter() + enough_s
    while time.perf_counter() < end or runs < _FEWEST_RUNS:
        start = time.perf_counter()
        work()
        wait_for(device)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


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
