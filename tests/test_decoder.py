"""Prompts in passes of micro-batches over a cache, on a made-up model whose logits depend on every token before them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.config import GenerationConfig, SamplingConfig
from offload.errors import Cancelled, ContextError, UsageError
from offload.generate import Decoder, generate
from offload.kernels.batch import Floats, MicroBatch
from offload.results import Chunk
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken

CTX, VOCAB, BATCH = 24, 11, 4


def digest(tokens: Sequence[int]) -> Floats:
    """The plain reference: logits after `tokens`."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 65521
    return np.array([(state * (column + 3)) % 251 for column in range(VOCAB)], np.float32)


class FakeRunner:
    """Runner, table, scheduler and backend in one; a cache of tokens by position; the `fails_at`-th pass is cancelled."""

    def __init__(self, per_pass: int) -> None:
        config = SimpleNamespace(vocab_size=VOCAB)
        self.opened = SimpleNamespace(ctx=CTX, model=SimpleNamespace(config=config), tokenizer=None)
        self.plan = SimpleNamespace(prefill_tokens_per_pass=per_pass)
        self.telemetry = Telemetry()
        self.table = self.scheduler = self.backend = self
        self.cache = [-1] * CTX
        self.room: tuple[int, int] | None = None
        self.passes: list[Sequence[MicroBatch]] = []
        self.fails_at = 0

    def make_room(self, positions: int, pass_tokens: int) -> None:
        self.room = positions, pass_tokens

    def lend(self, positions: int, cancel: CancelToken) -> None:
        self.room = positions, 1

    def rows(self, tokens: Sequence[int], cancel: CancelToken) -> Floats:
        return np.array([tokens], np.float32).T

    def forward(self, batches: Sequence[MicroBatch], hidden: Floats, cancel: CancelToken) -> None:
        assert self.room is not None and batches[-1].kv_length <= self.room[0], "no room was made for these positions"
        assert len(hidden) == sum(batch.num_tokens for batch in batches) <= self.room[1]
        self.passes.append(batches)
        if len(self.passes) == self.fails_at:
            raise Cancelled("cancelled")
        self.results = []
        for batch in batches:
            self.cache[batch.start : batch.kv_length] = [int(value) for value in hidden[: batch.num_tokens, 0]]
            hidden = hidden[batch.num_tokens :]
            ends = [batch.start + row + 1 for row in batch.outputs]
            self.results.append(np.array([digest(self.cache[:end]) for end in ends], np.float32))

    def logits(self, batch: int) -> Floats:
        return self.results[batch]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.generate.MICRO_BATCH_TOKENS", BATCH)
    monkeypatch.setattr("offload.generate.logits_rows", lambda _: BATCH)


def make(per_pass: int) -> tuple[Decoder, FakeRunner]:
    runner = FakeRunner(per_pass)
    return Decoder(runner), runner  # type: ignore[arg-type]


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=CTX)  # few kinds, so that prompts share prefixes
REQUESTS = st.lists(
    st.tuples(TOKENS, st.lists(st.integers(0, 2), max_size=4), st.integers(0, 4)), min_size=1, max_size=6
)
PER_PASS = st.sampled_from([BATCH, 2 * BATCH, 5 * BATCH])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@settings(deadline=None)
@given(PER_PASS, REQUESTS)
def test_logits_are_those_of_the_whole_prompt_whatever_was_cached_or_cancelled_before(
    per_pass: int, requests: list[tuple[list[int], list[int], int]]
) -> None:
    decoder, runner = make(per_pass)
    held: list[int] = []  # what the cache must hold
    for prompt, more, fails_at in requests:
        expected = common(held, prompt[:-1])
        sizes = [min(per_pass, len(prompt) - start) for start in range(expected, len(prompt), per_pass)]
        runner.passes, runner.fails_at, progress = [], fails_at, list[tuple[int, int]]()
        note = lambda done, total, seen=progress: seen.append((done, total))  # noqa: E731
        if 0 < fails_at <= len(sizes):
            with pytest.raises(Cancelled):
                decoder.prefill(prompt, CancelToken(), note)
            held = prompt[: expected + sum(sizes[: fails_at - 1])]
            assert len(decoder) == len(held)
            continue
        runner.fails_at = 0
        logits, cached = decoder.prefill(prompt, CancelToken(), note)
        assert cached == expected
        assert np.array_equal(logits, digest(prompt))
        assert runner.room == (len(prompt), len(prompt) - cached)
        assert [sum(batch.num_tokens for batch in batches) for batches in runner.passes] == sizes
        flat = [batch for batches in runner.passes for batch in batches]
        assert [batch.start for batch in flat] == list(range(cached, len(prompt), BATCH))
        assert [batch.outputs for batch in flat] == [()] * (len(flat) - 1) + [(flat[-1].num_tokens - 1,)]
        total = len(prompt) - cached
        assert progress == [(sum(sizes[:done]), total) for done in range(len(sizes) + 1)]
        held = list(prompt)
        for token in more[: decoder.room]:
            held.append(token)
            assert np.array_equal(decoder.step(token, CancelToken()), digest(held))
        assert len(decoder) == CTX - decoder.room == len(held)


@given(TOKENS, TOKENS, PER_PASS)
def test_all_logits_are_one_row_for_every_token_and_forget_the_cache(
    before: list[int], tokens: list[int], n: int
) -> None:
    decoder, runner = make(n)
    decoder.prefill(before, CancelToken(), None)
    runner.passes = []
    rows = decoder.all_logits(tokens, CancelToken())
    assert np.array_equal(rows, [digest(tokens[: end + 1]) for end in range(len(tokens))])
    assert [len(batches) for batches in runner.passes] == [1] * -(-len(tokens) // BATCH)
    assert len(decoder) == 0
    assert decoder.prefill(before, CancelToken(), None)[1] == 0


def test_a_prompt_that_cannot_be_is_refused_before_anything_is_computed() -> None:
    decoder, runner = make(BATCH)
    for tokens, error in (([], UsageError), ([1] * (CTX + 1), ContextError)):
        with pytest.raises(error):
            decoder.prefill(tokens, CancelToken(), None)
    with pytest.raises(ContextError, match=str(CTX + 1)):
        decoder.all_logits([1] * (CTX + 1), CancelToken())
    assert not runner.passes


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(digest(tokens).argmax()))
    return tokens[len(prompt) :]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=CTX - 1), st.none() | st.integers(0, CTX + 2), st.integers(0, 6)
)
def test_an_answer_is_the_greedy_chain_up_to_a_limit_the_context_or_a_cancel(
    prompt: list[int], most: int | None, fails_at: int
) -> None:
    decoder, runner = make(2 * BATCH)
    runner.fails_at = fails_at
    chunks: list[Chunk] = []
    config = GenerationConfig(max_tokens=most, sampling=SamplingConfig(temperature=0), ignore_eos=True)
    answer = generate(decoder, runner, prompt, config, CancelToken(), chunks.append, None)  # type: ignore[arg-type]
    limit = CTX - len(prompt) + 1  # the last token needs no position: nothing follows it
    expected = limit if most is None else min(most, limit)
    prefills = -(-len(prompt) // (2 * BATCH))
    passes = prefills + max(0, expected - 1)
    cancelled = 0 < fails_at <= passes
    count = max(0, fails_at - prefills) if cancelled else expected
    assert answer.tokens == greedy(prompt, count) == [token for chunk in chunks for token in chunk.tokens]
    assert answer.finish_reason == ("cancelled" if cancelled else "length")
    assert answer.prompt_tokens == len(prompt)
    runner.fails_at = 0
    assert np.array_equal(decoder.prefill(prompt, CancelToken(), None)[0], digest(prompt)), "and it goes on from there"
