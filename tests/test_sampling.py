from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload.config import SamplingConfig
from offload.errors import BackendError, UsageError
from offload.models.checkpoint import open_checkpoint
from offload.models.text import open_tokenizer
from offload.models.text.llama import llama
from offload.sampling import Logits, Sampler

SIZE = 64
FLAT = SamplingConfig(temperature=1, top_k=0, top_p=1, min_p=0, seed=1)


def logits_of(seed: int = 0, size: int = SIZE, scale: float = 2.0) -> Logits:
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def softmax(logits: Logits) -> np.ndarray[Any, Any]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def drawn(config: SamplingConfig, logits: Logits, count: int = 400, prompt: tuple[int, ...] = ()) -> Counter[int]:
    sampler = Sampler(config, len(logits))
    sampler.accept_prompt(prompt)
    tokens = Counter(sampler.sample(logits) for _ in range(count))
    sampler.close()
    return tokens


def change(**fields: object) -> SamplingConfig:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    return SamplingConfig(**{**defaults, **fields})  # type: ignore[arg-type]


def test_temperature_zero_takes_the_largest_and_leaves_the_logits_alone() -> None:
    logits = logits_of()
    before = logits.copy()
    assert Sampler(change(temperature=0), SIZE).sample(logits) == int(np.argmax(logits))
    assert np.array_equal(logits, before)


def test_draws_follow_the_softmax() -> None:
    logits, count = logits_of(size=8), 20_000
    seen = drawn(FLAT, logits, count)
    frequencies = np.array([seen[token] / count for token in range(8)])
    assert np.abs(frequencies - softmax(logits)).max() < 0.015


def test_temperature_sharpens() -> None:
    logits, count = logits_of(size=8), 20_000
    seen = drawn(change(temperature=0.5), logits, count)
    frequencies = np.array([seen[token] / count for token in range(8)])
    assert np.abs(frequencies - softmax(logits * 2)).max() < 0.015


def top_k(logits: Logits) -> set[int]:
    return set(np.argsort(-logits)[:5].tolist())


def top_p(logits: Logits) -> set[int]:
    order = np.argsort(-logits)
    total = np.cumsum(softmax(logits)[order])
    return set(order[: int(np.searchsorted(total, 0.6)) + 1].tolist())


def min_p(logits: Logits) -> set[int]:
    probabilities = softmax(logits)
    return set(np.flatnonzero(probabilities >= 0.2 * probabilities.max()).tolist())


def typical(logits: Logits) -> set[int]:
    probabilities = softmax(logits)
    entropy = -(probabilities * np.log(probabilities)).sum()
    order = np.argsort(np.abs(-np.log(probabilities) - entropy), kind="stable")
    total = np.cumsum(probabilities[order])
    return set(order[: int(np.searchsorted(total, 0.3)) + 1].tolist())


def top_n_sigma(logits: Logits) -> set[int]:
    return set(np.flatnonzero(logits >= logits.max() - logits.std()).tolist())


def xtc(logits: Logits) -> set[int]:
    probabilities = softmax(logits)
    above = [t for t in np.argsort(-probabilities) if probabilities[t] >= 0.05]
    return set(range(len(logits))) - {int(token) for token in above[:-1]}


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"top_k": 5}, top_k),
        ({"top_p": 0.6}, top_p),
        ({"min_p": 0.2}, min_p),
        ({"typical_p": 0.3}, typical),
        ({"top_n_sigma": 1.0}, top_n_sigma),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.05}, xtc),
    ],
)
def test_a_filter_keeps_what_its_definition_says(fields: dict[str, float], allowed: Any) -> None:
    logits = logits_of(3, size=24)
    expected = allowed(logits)
    assert 0 < len(expected) < 24
    seen = set(drawn(change(**fields), logits, 4000))
    assert seen <= expected
    assert {token for token in expected if softmax(logits)[token] > 0.01} <= seen


@pytest.mark.parametrize("mirostat", [1, 2])
def test_mirostat_draws_by_seed_and_respects_exclusions(mirostat: int) -> None:
    logits = logits_of(size=512)
    logits[:256] = -np.inf
    first = drawn(change(mirostat=mirostat), logits, 200)
    assert min(first) >= 256
    assert len(first) > 3
    assert first == drawn(change(mirostat=mirostat), logits, 200)


def test_the_same_seed_gives_the_same_tokens_and_another_one_does_not() -> None:
    logits = logits_of()
    sampler = Sampler(change(seed=7), SIZE)
    first = [sampler.sample(logits) for _ in range(30)]
    sampler.reset()
    assert [sampler.sample(logits) for _ in range(30)] == first
    other = Sampler(change(seed=8), SIZE)
    assert [other.sample(logits) for _ in range(30)] != first


def test_a_missing_seed_is_drawn_and_reported() -> None:
    assert Sampler(change(seed=None), SIZE).seed != Sampler(change(seed=None), SIZE).seed


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"repeat_penalty": 2.0}, lambda logit, _: logit / 2 if logit > 0 else logit * 2),
        ({"presence_penalty": 1.5}, lambda logit, _: logit - 1.5),
        ({"frequency_penalty": 0.5}, lambda logit, count: logit - 0.5 * count),
    ],
)
def test_greedy_applies_penalties_to_accepted_tokens(fields: dict[str, float], expected: Any) -> None:
    logits = np.zeros(4, dtype=np.float32)
    logits[:] = [2.0, 1.2, 1.2, -3.0]
    prompt = (0, 0, 0)
    penalised = logits.copy()
    penalised[0] = expected(logits[0], 3)
    config = change(temperature=0, **fields)
    sampler = Sampler(config, 4)
    assert sampler.sample(logits) == 0
    sampler.accept_prompt(prompt)
    assert sampler.sample(logits) == int(np.argmax(penalised)) == 1
    sampler.reset()
    assert sampler.sample(logits) == 0


def test_the_penalty_window_forgets_old_tokens() -> None:
    logits = np.array([2.0, 1.5, 0.0], dtype=np.float32)
    sampler = Sampler(change(temperature=0, presence_penalty=1.0, repeat_last_n=2), 3)
    sampler.accept_prompt([0, 2, 2])
    assert sampler.sample(logits) == 0
    unlimited = Sampler(change(temperature=0, presence_penalty=1.0, repeat_last_n=-1), 3, context=16)
    unlimited.accept_prompt([0, *[2] * 10])
    assert unlimited.sample(logits) == 1


def test_logit_bias_raises_lowers_and_excludes() -> None:
    logits = logits_of()
    best = int(np.argmax(logits))
    assert Sampler(change(temperature=0, logit_bias={5: 100.0}), SIZE).sample(logits) == 5
    assert Sampler(change(temperature=0, logit_bias={best: -math.inf}), SIZE).sample(logits) != best
    assert best not in drawn(change(logit_bias={best: -math.inf}), logits)


@pytest.mark.parametrize(
    "bias",
    [
        {SIZE: 1.0},
        {-1: 1.0},
        {10**5000: 1.0},
        {0: math.nan},
        {0: math.inf},
        {0: 1e300},
        {0: -1e300},
        {0: 3.4e38},
        {0: 10**400},
        {0: -(10**5000)},
        {0: True},
        {10**5000: "a"},
    ],
)
def test_a_bias_that_cannot_be_is_refused(bias: dict[int, float]) -> None:
    with pytest.raises(UsageError, match="logit_bias"):
        Sampler(change(logit_bias=bias), SIZE)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-38, 1e-37, 1e-20])
@pytest.mark.parametrize("fields", [{}, {"mirostat": 1}, {"mirostat": 2}, {"repeat_penalty": 1.1}])
def test_a_temperature_that_no_logit_can_be_divided_by_is_greedy(temperature: float, fields: dict[str, Any]) -> None:
    logits = logits_of(scale=20)
    assert set(drawn(change(temperature=temperature, **fields), logits, 50)) == {int(np.argmax(logits))}
    assert set(drawn(change(temperature=temperature, **fields), -np.abs(logits), 50)) == {
        int(np.argmin(np.abs(logits)))
    }


@pytest.mark.parametrize("fields", [{"temperature": 0}, {}, {"mirostat": 1}, {"mirostat": 2}])
def test_a_bias_that_leaves_no_token_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="logit_bias: it excludes all 64 tokens"):
        Sampler(change(logit_bias=dict.fromkeys(range(SIZE), -math.inf), **fields), SIZE)
    logits = np.full(SIZE, -np.inf, dtype=np.float32)
    logits[[7, 9]] = 1.0, 2.0  # all that a constraint allows
    one = Sampler(change(logit_bias={9: -math.inf}, **fields), SIZE)
    assert one.sample(logits) == 7
    both = Sampler(change(logit_bias={7: -math.inf, 9: -math.inf}, **fields), SIZE)
    with pytest.raises(UsageError, match="logit_bias: it excludes every token that could come next"):
        both.sample(logits)


@pytest.mark.parametrize("largest", [1e20, Fraction(10**20)])
def test_the_largest_bias_still_can_be_computed_with(largest: Any) -> None:
    for fields in ({}, {"mirostat": 2}, {"temperature": 1e-6, "repeat_penalty": 1e-3}):
        seen = drawn(change(logit_bias={5: largest, 6: -largest}, **fields), logits_of(), 50, prompt=(5,))
        assert set(seen) == {5}


def test_dry_breaks_a_repetition_also_when_greedy() -> None:
    logits = np.array([0.0, 1.0, 2.0, 3.0], dtype=np.float32)
    config = change(temperature=0, dry_multiplier=5.0, dry_allowed_length=2, dry_sequence_breakers=())
    sampler = Sampler(config, 4)
    assert sampler.sample(logits) == 3
    sampler.accept_prompt([0, 1, 2, 3, 0, 1, 2])
    assert sampler.sample(logits) == 2


def test_dry_with_breakers_and_no_vocabulary_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"dry_sequence_breakers=\(\)"):
        Sampler(change(dry_multiplier=0.8), SIZE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = logits_of()
    logits[3] = bad
    with pytest.raises(BackendError, match="no token can be chosen"):
        Sampler(change(temperature=temperature), SIZE).sample(logits)
    with pytest.raises(BackendError):
        Sampler(change(temperature=temperature), SIZE).sample(np.full(SIZE, -np.inf, dtype=np.float32))


def test_logprobs_are_the_log_softmax() -> None:
    logits = logits_of()
    logits[9] = -np.inf
    expected = np.log(np.maximum(softmax(logits), 1e-300))
    result = Sampler(FLAT, SIZE).logprobs(logits, 4, 5)
    assert result.logprob == pytest.approx(expected[4], abs=1e-5)
    assert [a.token for a in result.top] == np.argsort(-logits)[:5].tolist()
    assert [a.logprob for a in result.top] == pytest.approx([expected[a.token] for a in result.top], abs=1e-5)
    assert Sampler(FLAT, SIZE).logprobs(logits, 4, 0).top == ()
    assert len(Sampler(FLAT, SIZE).logprobs(logits, 4, 1000).top) == SIZE


@pytest.mark.parametrize(
    "fields",
    [{"seed": 2**32 - 1}, {"repeat_penalty": 0.0}, {"top_k": 2**32 + 1}, {"dry_base": math.nan}, {"repeat_last_n": -2}],
)
def test_values_that_llama_cpp_would_misread_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        change(**fields)


@pytest.mark.parametrize("breakers", [("\ud800",), ("a",) * 101, ("a", 3)])
def test_sequence_breakers_that_cannot_be_are_refused(breakers: Any) -> None:
    with pytest.raises(UsageError, match="dry_sequence_breakers"):
        change(dry_sequence_breakers=breakers)
    assert change(dry_sequence_breakers=("ü",) * 100)


def test_closing_twice_is_fine() -> None:
    sampler = Sampler(FLAT, SIZE)
    sampler.close()
    sampler.close()


@pytest.fixture(scope="module")
def demo_vocab(demo: Path) -> Iterator[Any]:
    tokenizer: Any = open_tokenizer(open_checkpoint(demo))
    yield tokenizer
    tokenizer.close()


def test_dry_stops_at_a_sequence_breaker(demo_vocab: Any) -> None:
    size = demo_vocab.vocab_size
    one, two, three, colon = (demo_vocab.encode(text)[0] for text in ("one", "two", "three", ":"))
    logits = np.zeros(size, dtype=np.float32)
    logits[three] = 1.0
    config = change(temperature=0, dry_multiplier=5.0)
    repeated = Sampler(config, size, demo_vocab.vocab)
    repeated.accept_prompt([one, two, three, one, two])
    assert repeated.sample(logits) != three
    broken = Sampler(config, size, demo_vocab.vocab)
    broken.accept_prompt([one, two, colon, three, one, two, colon])
    assert broken.sample(logits) == three


def test_defaults_agree_with_a_chain_built_by_hand(demo_vocab: Any) -> None:
    """llama.cpp's own calls, in the order of its common sampler, over a plain array of candidates."""
    size, seed = demo_vocab.vocab_size, 11
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for stage in (
        llama.llama_sampler_init_penalties(size, 64, 1.3, 0.0, 0.0),
        llama.llama_sampler_init_top_k(40),
        llama.llama_sampler_init_top_p(0.95, 0),
        llama.llama_sampler_init_min_p(0.05, 0),
        llama.llama_sampler_init_temp(0.8),
        llama.llama_sampler_init_dist(seed),
    ):
        llama.llama_sampler_chain_add(chain, stage)
    sampler = Sampler(SamplingConfig(seed=seed, repeat_penalty=1.3), size, demo_vocab.vocab)
    for step in range(20):
        logits = logits_of(step, size)
        data = (llama.llama_token_data * size)(*((i, logit, 0.0) for i, logit in enumerate(logits.tolist())))
        array = llama.llama_token_data_array(data, size, -1, False)
        llama.llama_sampler_apply(chain, ctypes.byref(array))
        expected = array.data[array.selected].id
        assert sampler.sample(logits) == expected
        sampler.accept(expected)
        llama.llama_sampler_accept(chain, expected)
    llama.llama_sampler_free(chain)
