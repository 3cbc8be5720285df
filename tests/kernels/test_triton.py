"""Triton kernels against ggml: values bit for bit, products to rounding. On a card, or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from offload.elements import F8_E4M3, ElementType, element_type
from offload.kernels.ggml.dequantize import dequantize

pytest.importorskip("triton", reason="triton is for Linux only")

from offload.kernels.triton.kernels import SUPPORTED, expert_products, product, values

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter is numpy
types = pytest.mark.parametrize(
    "name", sorted(SUPPORTED - {F8_E4M3.name})
)  # which ggml has not: see `test_fp8_kernels`


def random_matrix(element: ElementType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Stored bytes of a matrix with scales near one, so that sums stay finite."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, columns // element.block_elements, element.block_bytes), dtype=np.uint8)
    halves = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (), "F32": (), "F16": (), "BF16": ()}.get(
        element.name, (0,)
    )
    for offset in halves:
        scale = random.uniform(0.001, 0.02, raw.shape[:2]).astype(np.float16)
        raw[..., offset : offset + 2] = scale[..., None].view(np.uint8)
    if element.block_elements == 1:
        numbers = random.uniform(-1, 1, raw.shape[:2]).astype(np.float32)
        return as_stored(numbers, element)
    if element.name == "MXFP4":
        raw[..., 0] = random.integers(118, 124, raw.shape[:2])
    return raw


def as_stored(numbers: np.ndarray, element: ElementType) -> np.ndarray:
    if element.name == "BF16":
        return np.ascontiguousarray(numbers.view(np.uint8).reshape(*numbers.shape, 4)[..., 2:])
    kept = numbers.astype(np.float16) if element.name == "F16" else numbers
    return kept.view(np.uint8).reshape(*numbers.shape, -1)


def as_tensor(raw: np.ndarray, device: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(raw).reshape(-1)).to(device)


def same_bits(raw: np.ndarray, element: ElementType, device: str) -> None:
    count = raw.size // element.block_bytes * element.block_elements
    expected = dequantize(np.ascontiguousarray(raw).reshape(-1), element, count)
    actual = values(as_tensor(raw, device), element, (count,)).cpu().numpy()
    both_nan = np.isnan(expected) & np.isnan(actual)
    differs = (expected.view(np.uint32) != actual.view(np.uint32)) & ~both_nan
    where = np.flatnonzero(differs)[:4]
    assert not differs.any(), (element.name, where, expected[where], actual[where])


@types
def test_random_blocks_have_ggmls_bits(name: str, triton_device: str) -> None:
    element = element_type(name)
    raw = np.random.default_rng(1).integers(0, 256, (257, element.block_bytes), dtype=np.uint8)
    same_bits(raw, element, triton_device)


@types
def test_extreme_blocks_have_ggmls_bits(name: str, triton_device: str) -> None:
    """All bytes equal: largest and smallest codes, denormal, infinite and not-a-number scales."""
    element = element_type(name)
    same_bits(np.repeat(np.arange(256, dtype=np.uint8)[:, None], element.block_bytes, axis=1), element, triton_device)


@types
def test_every_byte_of_a_block_is_used_as_ggml_uses_it(name: str, triton_device: str) -> None:
    element = element_type(name)
    size = element.block_bytes
    base = np.zeros((3 * size, size), dtype=np.uint8)
    base[size:] = 0x3C
    for index in range(size):
        base[[index, size + index, 2 * size + index], index] = (0x5A, 0xA5, 0xFF)
    same_bits(base, element, triton_device)


@types
@pytest.mark.parametrize(("rows", "blocks", "tokens"), [(1, 1, 1), (8, 8, 1), (13, 3, 2), (21, 9, 1)])
def test_a_product_is_that_of_the_values(name: str, rows: int, blocks: int, tokens: int, triton_device: str) -> None:
    """Rows and columns that fill a program, and that do not."""
    element = element_type(name)
    shape = (rows, blocks * element.block_elements)
    raw = random_matrix(element, *shape)
    matrix = dequantize(raw.reshape(-1), element, rows * shape[1]).reshape(shape)
    x = np.random.default_rng(2).standard_normal((tokens, shape[1])).astype(np.float32)
    stored = as_tensor(raw, triton_device)
    found = product(torch.from_numpy(x).to(triton_device), stored, element, shape).cpu().numpy()
    expected = x.astype(np.float64) @ matrix.T.astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.abs(matrix).T.astype(np.float64)
    assert np.abs(found - expected).max() <= 1e-6 * scale.max()


@types
@pytest.mark.parametrize("shared", [True, False])
def test_experts_are_taken_from_their_slots(name: str, shared: bool, triton_device: str) -> None:
    element = element_type(name)
    shape, slots, offset = (10, 2 * element.block_elements), [4, 0, 2], 64
    matrices = [random_matrix(element, *shape, seed=slot) for slot in range(5)]
    stride = offset + matrices[0].size + 32
    bank = np.full(5 * stride, 0x7E, np.uint8)
    for slot, raw in enumerate(matrices):
        bank[slot * stride + offset : slot * stride + offset + raw.size] = raw.reshape(-1)
    x = np.random.default_rng(3).standard_normal((1 if shared else 3, shape[1])).astype(np.float32)
    found = expert_products(
        torch.from_numpy(x).to(triton_device), torch.tensor(slots, dtype=torch.int32, device=triton_device),
        as_tensor(bank, triton_device), offset, stride, element, shape,
    ).cpu().numpy()  # fmt: skip
    for place, slot in enumerate(slots):
        matrix = dequantize(matrices[slot].reshape(-1), element, shape[0] * shape[1]).reshape(shape)
        assert found[place] == pytest.approx(matrix @ x[0 if shared else place], rel=1e-4, abs=1e-4)


@types
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_rounded_to_what_is_asked_for(name: str, dtype: torch.dtype, triton_device: str) -> None:
    element = element_type(name)
    raw = random_matrix(element, 3, 2 * element.block_elements)
    exact = values(as_tensor(raw, triton_device), element, (3, 2 * element.block_elements))
    rounded = values(as_tensor(raw, triton_device), element, tuple(exact.shape), dtype)
    assert rounded.dtype == dtype
    # one unit in the last place: the interpreter cuts a bfloat16 off where a card rounds it
    assert torch.allclose(rounded.float(), exact, rtol=float(torch.finfo(dtype).eps), atol=1e-7)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from offload.elements import element_type
from offload.kernels.triton import kernels

for name, columns in [(name, columns) for name in sys.argv[2:] for columns in ([256] if name != "F8_E4M3" else [256, 4])]:
    form, elements, nbytes = kernels._form(element_type(name), columns)
    geometry = {"decode": form.decode, "order": form.order, "block_elements": elements, "block_bytes": nbytes,
                "has_scales": name == "F8_E4M3"}
    step, count = (max(1, most // elements) for most in (kernels.STEP_ELEMENTS, kernels.VALUES_BLOCKS))
    pointers = {"x": "*fp32", "matrices": "*u8", "slots": "*i32", "out": "*fp32", "blocks": "*u8", "scales": "*fp32"}
    for kernel, constants in (
        (kernels._product, {**geometry, "rows": kernels.ROWS, "step": step, "has_slots": True}),
        (kernels._values, {**geometry, "count": count}),
    ):
        signature = {arg: "constexpr" if arg in constants else pointers.get(arg, "i32") for arg in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        options = {"enable_fp_fusion": kernel is kernels._product}
        compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
        print(name, kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared)
"""


@pytest.mark.parametrize("capability", [75, 90])
def test_kernels_compile_for_a_card(capability: int, tmp_path) -> None:
    """Down to machine code, which needs no card: from Turing to Hopper."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), *sorted(SUPPORTED)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    assert len(done.stdout.splitlines()) == 2 * (len(SUPPORTED) + 1)  # FP8 in two ways
