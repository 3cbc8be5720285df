"""Models by Triton's kernels, interpreted or on a card: the logits of matrices that the CPU decodes, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint
from support.devices import computed_on
from support.fp8_checkpoints import fp8_checkpoint
from support.gguf_checkpoints import gguf_checkpoint

import offload
from offload.elements import F8_E4M3, element_type
from offload.kernels.torch.products import FEW_TOKENS, DecodedProducts, products_for

pytest.importorskip("triton", reason="triton is for Linux only")

from offload.kernels.triton.products import TritonProducts

PROMPT = [7 * n % 250 for n in range(FEW_TOKENS + 3)]


class Counted(TritonProducts):
    """Says how many tokens each product had, by type, and how many experts those had that took several."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.seen: list[tuple[str, int]] = []
        self.chosen: list[int] = []

    def expert_products(self, x, slots, bank, offset, stride, element, shape, scales=None):
        self.chosen.append(slots.numel())
        return super().expert_products(x, slots, bank, offset, stride, element, shape, scales)

    def product(self, x, raw, element, shape, scales=None):
        self.seen.append((element.name, x.shape[0]))
        return super().product(x, raw, element, shape, scales)


@pytest.mark.parametrize(
    ("family", "element"),
    [
        ("llama", "Q4_0"), ("olmoe", "Q8_0"), ("gpt_oss", "MXFP4"), ("qwen2", "F16"), ("llama", "Q4_1"),
        ("qwen3_moe", "F8_E4M3"),
    ],
)  # fmt: skip
def test_a_model_says_the_same(
    family: str, element: str, triton_device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if element == F8_E4M3.name:  # of more than a block in each direction: as little else as can be, for the interpreter
        few = {"num_hidden_layers": 1, "num_experts": 3, "num_experts_per_tok": 2}
        model = fp8_checkpoint(family, tmp_path, **few).folder
    else:
        model = gguf_checkpoint(family, tmp_path, element)
    with offload.load(model, ctx=64, **computed_on("cpu")) as engine:
        expected = engine.logits(PROMPT), engine.generate(PROMPT, max_tokens=4, temperature=0, ignore_eos=True).tokens
    counted = Counted()
    monkeypatch.setattr("offload.kernels.torch.backend.products_for", lambda device: counted)
    with offload.load(model, ctx=64, **computed_on(triton_device)) as engine:
        logits = engine.logits(PROMPT)
        tokens = engine.generate(PROMPT, max_tokens=4, temperature=0, ignore_eos=True).tokens
    assert np.abs(logits - expected[0]).max() < 1e-4 * np.abs(expected[0]).max()
    assert tokens == expected[1]
    assert {count for name, count in counted.seen if name == element} >= {1, len(PROMPT)}


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2"])
def test_experts_of_few_tokens_take_three_products_and_give_what_ggml_does(
    family: str, triton_device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card a token is replayed from its second one on, and nobody counts."""
    model, counted = tiny_checkpoint(family, tmp_path), Counted()  # float32: ggml computes what is stored
    tokens = PROMPT[:FEW_TOKENS]
    with offload.load(model, ctx=64, kv_type="f32") as engine:
        expected = engine.logits(tokens), engine._stepwise_logits(tokens[:2])
        layers = list(engine._runner.opened.model.experts.values())
    monkeypatch.setattr("offload.kernels.torch.backend.products_for", lambda device: counted)
    with offload.load(model, ctx=64, **computed_on(triton_device)) as engine:
        for count, found, logits in ((len(tokens), engine.logits(tokens), expected[0]),
                                     (1, engine._stepwise_logits(tokens[:2]), expected[1])):  # fmt: skip
            assert np.abs(found - logits).max() < 1e-4 * np.abs(logits).max()
            passes = [layers] if count > 1 else 2 * [layers]
            launched = [count * layer.num_used for one in passes for layer in one for _ in "gud"]
            if triton_device == "cpu":
                assert counted.chosen[: len(launched)] == launched
            del counted.chosen[: len(launched)]
    assert not counted.chosen or triton_device == "cuda"


class Bank(NamedTuple):
    """Matrices of 10 rows at numbered places, some of which overlap, with noise in between."""

    raw: torch.Tensor
    starts: list[int]


OFFSET, UNIT, SHAPE = 256, 256, (10, 64)


def bank_of(name: str) -> Bank:
    element = element_type(name)
    random = np.random.default_rng(5)
    raw = random.integers(0, 256, 64 * UNIT, dtype=np.uint8)
    nbytes = SHAPE[0] * element.row_bytes(SHAPE[1])
    starts = [0, 7, 20, 41]
    for start in starts:
        numbers = raw[start * UNIT + OFFSET :][:nbytes].reshape(-1, element.block_bytes)
        numbers[:, :2] = np.full(len(numbers), 0.01 * (start + 1), np.float16)[:, None].view(np.uint8)
    return Bank(torch.from_numpy(raw), starts)


@settings(max_examples=12, deadline=None)
@given(order=st.lists(st.integers(0, 3), min_size=1, max_size=6), name=st.sampled_from(["Q8_0", "Q4_0", "IQ4_NL"]))
def test_what_an_expert_returns_depends_on_nothing_beside_it(multiplier, order: list[int], name: str) -> None:
    """Types with a kernel and without, slots in any order and again, one row for all or one for each."""
    element, bank, (products, device) = element_type(name), bank_of(name), multiplier
    x = torch.from_numpy(np.random.default_rng(6).standard_normal((len(order), SHAPE[1])).astype(np.float32))
    slots = torch.tensor([bank.starts[number] for number in order], dtype=torch.int32)

    def product(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        given = (tensor.to(device) for tensor in (rows, slots, bank.raw))
        return products.expert_products(*given, OFFSET, UNIT, element, SHAPE).cpu()

    together, shared = product(x, slots), product(x[:1], slots)
    for row, slot in enumerate(slots.tolist()):
        assert torch.equal(together[row : row + 1], product(x[row : row + 1], slots[row : row + 1]))
        raw = bank.raw[slot * UNIT + OFFSET :][: SHAPE[0] * element.row_bytes(SHAPE[1])]
        plain = DecodedProducts().product(x, raw, element, SHAPE)
        assert torch.allclose(together[row], plain[row], rtol=1e-4, atol=1e-4)
        assert torch.allclose(shared[row], plain[0], rtol=1e-4, atol=1e-4)


def test_without_a_card_matrices_are_decoded() -> None:
    assert isinstance(products_for(torch.device("cpu")), DecodedProducts)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_1"])
def test_few_tokens_and_many_have_the_product_of_decoded_matrices(name: str, tokens: int, triton_device: str) -> None:
    element, shape = element_type(name), (10, 64)
    random = np.random.default_rng(4)
    raw = random.integers(0, 256, (10, 2, element.block_bytes), dtype=np.uint8)
    raw[..., :2] = np.full((10, 2), 0.01, np.float16)[..., None].view(np.uint8)
    if name == "Q4_1":
        raw[..., 2:4] = raw[..., :2]
    stored = torch.from_numpy(raw.reshape(-1))
    x = torch.from_numpy(random.standard_normal((tokens, 64)).astype(np.float32))
    there, ours, plain = stored.to(triton_device), TritonProducts(torch.float32), DecodedProducts()
    found = ours.product(x.to(triton_device), there, element, shape).cpu()
    assert torch.allclose(found, plain.product(x, stored, element, shape), atol=1e-5)
    assert torch.equal(ours.values(there, element, shape).cpu(), plain.values(stored, element, shape))
