"""Models on `torch:cpu` by Triton's kernels, in the interpreter: the logits of decoded matrices, to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.gguf_checkpoints import gguf_checkpoint

import offload
from offload.elements import element_type
from offload.kernels.torch.products import DecodedProducts, products_for

pytest.importorskip("triton", reason="triton is for Linux only")

from offload.kernels.triton.products import FEW_TOKENS, TritonProducts

PROMPT = [7 * n % 250 for n in range(FEW_TOKENS + 3)]


class Counted(TritonProducts):
    """Says how many tokens each product had, by type."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.seen: list[tuple[str, int]] = []

    def product(self, x, raw, element, shape):
        self.seen.append((element.name, x.shape[0]))
        return super().product(x, raw, element, shape)


@pytest.mark.parametrize(
    ("family", "element"),
    [("llama", "Q4_0"), ("olmoe", "Q8_0"), ("gpt_oss", "MXFP4"), ("qwen2", "F16"), ("llama", "Q4_1")],
)
def test_a_model_says_the_same(family: str, element: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gguf_checkpoint(family, tmp_path, element)
    with offload.load(model, ctx=64, device="torch:cpu") as engine:
        expected = engine.logits(PROMPT), engine.generate(PROMPT, max_tokens=4, temperature=0, ignore_eos=True).tokens
    counted = Counted()
    monkeypatch.setattr("offload.kernels.torch.backend.products_for", lambda device: counted)
    with offload.load(model, ctx=64, device="torch:cpu") as engine:
        logits = engine.logits(PROMPT)
        tokens = engine.generate(PROMPT, max_tokens=4, temperature=0, ignore_eos=True).tokens
    assert np.abs(logits - expected[0]).max() < 1e-4 * np.abs(expected[0]).max()
    assert tokens == expected[1]
    assert {count for name, count in counted.seen if name == element} >= {1, len(PROMPT)}


def test_without_a_card_matrices_are_decoded() -> None:
    assert isinstance(products_for(torch.device("cpu")), DecodedProducts)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_1"])
def test_few_tokens_and_many_have_the_product_of_decoded_matrices(name: str, tokens: int) -> None:
    element, shape = element_type(name), (10, 64)
    random = np.random.default_rng(4)
    raw = random.integers(0, 256, (10, 2, element.block_bytes), dtype=np.uint8)
    raw[..., :2] = np.full((10, 2), 0.01, np.float16)[..., None].view(np.uint8)
    if name == "Q4_1":
        raw[..., 2:4] = raw[..., :2]
    stored = torch.from_numpy(raw.reshape(-1))
    x = torch.from_numpy(random.standard_normal((tokens, 64)).astype(np.float32))
    ours, plain = TritonProducts(torch.float32), DecodedProducts()
    assert torch.allclose(ours.product(x, stored, element, shape), plain.product(x, stored, element, shape), atol=1e-5)
    assert torch.equal(ours.values(stored, element, shape), plain.values(stored, element, shape))
