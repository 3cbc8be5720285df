"""Each operation of the torch backend against its definition, written out one number at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ropes import ropes

from offload.config import KV_BUCKET
from offload.kernels.ops import Attention
from offload.kernels.torch.attention import attend
from offload.kernels.torch.cache import TorchCache
from offload.kernels.torch.ops import TorchOps
from offload.kernels.torch.positions import Positions

TOKENS, HEADS, KV_HEADS, DIM = 5, 4, 2, 8
GENERATOR = torch.Generator().manual_seed(3)
WEIGHTS = {
    "matrix": torch.randn(6, DIM, generator=GENERATOR),
    "bias": torch.randn(6, generator=GENERATOR),
    "norm": torch.randn(DIM, generator=GENERATOR),
    "factors": torch.rand(DIM // 2, generator=GENERATOR) + 0.5,
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.fixture(autouse=True)
def own_numbers() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    GENERATOR.manual_seed(3)


def new_cache(device: str, *dtypes: torch.dtype) -> TorchCache:
    return TorchCache(2, 32, KV_HEADS, (DIM, DIM), dtypes or [torch.float32] * 2, torch.device(device))


class There:
    """A device's operations by name: tensors are sent to it, and what comes of them is fetched."""

    def __init__(self, ops: TorchOps, device: str) -> None:
        self._ops, self._device = ops, device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *given: fetched(getattr(self._ops, name)(*(sent(each, self._device) for each in given)))


def sent(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def fetched(value: Any) -> Any:
    return tuple(map(fetched, value)) if isinstance(value, tuple) else value.cpu()


def new_ops(device: str, start: int = 0, num_tokens: int = TOKENS, cache: TorchCache | None = None) -> There:
    positions = Positions(torch.arange(start, start + num_tokens, device=device), start + num_tokens)
    rows = torch.tensor([3, 1], device=device)
    ops = TorchOps(lambda name: WEIGHTS[name].to(device), cache or new_cache(device), positions, rows)
    return There(ops, device)


def test_linear(device: str) -> None:
    x = random(TOKENS, DIM)
    expected = torch.stack([WEIGHTS["matrix"] @ row for row in x])
    torch.testing.assert_close(new_ops(device).linear(x, "matrix"), expected)
    torch.testing.assert_close(new_ops(device).linear(x, "matrix", "bias"), expected + WEIGHTS["bias"])


def test_rms_norm_of_any_rank(device: str) -> None:
    x = random(TOKENS, HEADS, DIM)
    root = torch.tensor([[math.sqrt(sum(float(v) ** 2 for v in head) / DIM + 0.25) for head in token] for token in x])
    plain = x / root.unsqueeze(-1)
    torch.testing.assert_close(new_ops(device).rms_norm(x, None, 0.25), plain)
    torch.testing.assert_close(new_ops(device).rms_norm(x, "norm", 0.25), plain * WEIGHTS["norm"])


def test_elementwise_and_shapes(device: str) -> None:
    ops, a, b = new_ops(device), random(TOKENS, DIM), random(TOKENS, DIM)
    assert torch.equal(ops.add(a, b), a + b)
    assert torch.equal(ops.scale(a, 0.5), a / 2)
    torch.testing.assert_close(ops.softcap(a, 2.0), torch.tensor([[2 * math.tanh(v / 2) for v in row] for row in a]))
    first, second = ops.split(a, [3, 5])
    assert torch.equal(first, a[:, :3]) and torch.equal(second, a[:, 3:])
    assert torch.equal(ops.heads(a, 4)[2, 1], a[2, 2:4])
    assert torch.equal(ops.output_rows(a), a[[3, 1]])


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu", lambda v: v / (1 + math.exp(-v))),
        ("gelu", lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2),
        ("gelu_tanh", lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2),
    ],
)
def test_glu(name, activation, device: str) -> None:
    gate, up = random(TOKENS, DIM), random(TOKENS, DIM)
    expected = torch.tensor([[activation(float(v)) for v in row] for row in gate]) * up
    torch.testing.assert_close(new_ops(device).glu(gate, up, name), expected)


ROPES = ropes(DIM)


@pytest.mark.parametrize("name", ROPES)
def test_rope(name: str, device: str) -> None:
    rope, start = ROPES[name], 7
    x = random(TOKENS, HEADS, DIM)
    expected = x.clone()
    for token in range(TOKENS):
        for pair in range(rope.dims // 2):
            first, second = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + rope.dims // 2)
            divisor = 1.0 if rope.factors is None else float(WEIGHTS["factors"][pair])
            angle = (start + token) * rope.frequency_scale * rope.theta ** (-2 * pair / rope.dims) / divisor
            turned = (x[token, :, first] + 1j * x[token, :, second]) * complex(math.cos(angle), math.sin(angle))
            expected[token, :, first], expected[token, :, second] = turned.real, turned.imag
            expected[token, :, [first, second]] *= rope.magnitude
    torch.testing.assert_close(new_ops(device, start).rope(x, rope), expected, atol=1e-5, rtol=1e-5)


def naive_attention(query, keys, values, start: int, attention: Attention) -> torch.Tensor:
    """Loops over queries, heads and visible keys."""
    out = torch.zeros(query.shape[0], HEADS, DIM, dtype=torch.float64)
    for token in range(query.shape[0]):
        position = start + token
        lowest = 0 if attention.window is None else max(0, position - attention.window + 1)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            seen = range(lowest, position + 1)
            scores = [float(query[token, head] @ keys[k, group]) * attention.scale for k in seen]
            if attention.softcap is not None:
                scores = [attention.softcap * math.tanh(score / attention.softcap) for score in scores]
            weights = [math.exp(score - max(scores)) for score in scores]
            for k, weight in zip(seen, weights, strict=True):
                out[token, head] += values[k, group].double() * weight / sum(weights)
    return out.flatten(1).float()


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attention_over_cache_and_batch(window: int | None, softcap: float | None, device: str) -> None:
    """Three batches, the middle one a single token: each sees what the earlier ones stored."""
    attention = Attention(layer=1, scale=0.4, window=window, softcap=softcap)
    cache, length = new_cache(device), 11
    query, keys, values = random(length, HEADS, DIM), random(length, KV_HEADS, DIM), random(length, KV_HEADS, DIM)
    for start, stop in ((0, 5), (5, 6), (6, 11)):
        ops, rows = new_ops(device, start, stop - start, cache), slice(start, stop)
        mixed = ops.attention(query[rows], keys[rows], values[rows], attention)
        expected = naive_attention(query[rows], keys, values, start, attention)
        torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", [511, 512, 700, 767])
@pytest.mark.parametrize("window", [1, 2, 256, 257, 300])
def test_what_a_window_has_left_behind_is_not_looked_at(start: int, window: int) -> None:
    """Nothing is a number there; a prompt and a single token agree with the definition, and a bucket's tokens look alike."""
    attention, stop = Attention(layer=0, scale=0.4, window=window), start + TOKENS
    query, keys, values = random(TOKENS, HEADS, DIM), random(stop, KV_HEADS, DIM), random(stop, KV_HEADS, DIM)
    expected = naive_attention(query, keys, values, start, attention)
    bucket = start // KV_BUCKET * KV_BUCKET
    for rows in (slice(0, TOKENS), slice(0, 1)):
        at = torch.arange(start, stop)[rows]
        positions = Positions(at, int(at[-1]) + 1, first=start)
        begins = positions.start(window)
        assert begins % KV_BUCKET == 0 and bucket - window - KV_BUCKET < begins <= max(0, bucket - window + 1)
        assert begins == Positions(at, stop, first=bucket).start(window)
        cache = TorchCache(1, 1024, KV_HEADS, (DIM, DIM), [torch.float32] * 2, torch.device("cpu"))
        cache.store(0, torch.arange(stop), keys, values)
        cache.store(0, torch.arange(begins), *(torch.full((begins, KV_HEADS, DIM), torch.nan) for _ in range(2)))
        ops = TorchOps(WEIGHTS.__getitem__, cache, positions, torch.tensor([0]))
        mixed = ops.attention(query[rows], keys[start:][rows], values[start:][rows], attention)
        torch.testing.assert_close(mixed, expected[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [{"softcap": 0.7}, {"sinks": "sinks"}, {}])
def test_scores_of_few_tokens_at_a_time_are_those_of_all(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    attention, sinks = Attention(layer=0, scale=0.4, **kind), random(HEADS) if "sinks" in kind else None
    query, keys, values = random(TOKENS, HEADS, DIM), random(9, KV_HEADS, DIM), random(9, KV_HEADS, DIM // 2)
    mask = Positions(torch.arange(4, 9), 9).mask(None)
    whole = attend(query, keys, values, mask, attention, sinks)
    monkeypatch.setattr("offload.kernels.torch.attention.SCORES_BYTES", 4 * HEADS * 10 * 2)
    torch.testing.assert_close(attend(query, keys, values, mask, attention, sinks), whole, atol=1e-6, rtol=1e-6)


KINDS = [
    pytest.param(Attention(layer=0, scale=0.4, **kind), id=str(kind))  # type: ignore[arg-type]
    for kind in ({}, {"window": 7}, {"softcap": 0.7}, {"sinks": "sinks"}, {"window": 7, "sinks": "sinks"})
]


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_what_a_mask_hides_adds_nothing(
    attention: Attention, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    """A token at position 9 of tensors for 256: no bit depends on what lies behind, and no value on how long they are."""
    length, sinks, seen = 256, random(HEADS).to(device) if attention.sinks else None, []
    query, past = random(1, HEADS, DIM).to(device), random(2, length, KV_HEADS, DIM).to(device, dtype)
    at = torch.tensor([9], device=device)
    for behind in (0.0, 60000.0, -60000.0):
        past[:, 10:] = behind
        seen.append(attend(query, *past, Positions(at, length, dtype).mask(attention.window), attention, sinks))
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    short = Positions(at, 10).mask(attention.window)
    expected = attend(query, *past[:, :10].float(), short, attention, sinks)
    torch.testing.assert_close(seen[0], expected, atol=tolerance, rtol=tolerance)


def test_layers_do_not_share_their_past(device: str) -> None:
    cache = new_cache(device)
    key, value = random(TOKENS, KV_HEADS, DIM), random(TOKENS, KV_HEADS, DIM)
    new_ops(device, cache=cache).attention(random(TOKENS, HEADS, DIM), key, value, Attention(layer=0, scale=1.0))
    assert torch.equal(cache.load(0, TOKENS, DIM)[0].cpu(), key)
    assert torch.equal(cache.load(1, TOKENS, DIM)[1].cpu(), torch.zeros_like(value))


def test_cache_rounds_to_its_types(device: str) -> None:
    cache = new_cache(device, torch.float16, torch.bfloat16)
    key, value = random(2, KV_HEADS, DIM), random(2, KV_HEADS, DIM)
    cache.store(0, torch.tensor([4, 2], device=device), key.to(device), value.to(device))
    keys, values = (part.cpu() for part in cache.load(0, 5, DIM))
    assert keys.dtype == torch.float32 and keys.shape == (5, KV_HEADS, DIM)
    assert torch.equal(keys[[4, 2]], key.half().float()) and torch.equal(values[[4, 2]], value.bfloat16().float())
    assert cache.nbytes == 2 * 2 * 32 * KV_HEADS * DIM * 2
