"""One request: prompt in, tokens out. Knows sampling and text; leaves computing to the runner it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from offload.config import MICRO_BATCH_TOKENS, GenerationConfig
from offload.constraint import Constraint, ConstraintCompiler
from offload.demand import logits_rows
from offload.detokenize import IncrementalDetokenizer
from offload.errors import AllocationError, Cancelled, ContextError, UsageError
from offload.kernels.batch import Floats, MicroBatch
from offload.kv import CachedTokens
from offload.loader import Runner
from offload.models.text.base import Tokenizer
from offload.results import Chunk, FinishReason, TokenLogprobs
from offload.sampling import Sampler
from offload.stopping import StopMatcher
from offload.tiers.base import CancelToken

OnPrefill = Callable[[int, int], None]


@dataclass(slots=True)
class Answer:
    """What a generation has produced so far, and when."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason = "length"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    started_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0


class Decoder:
    """Runs tokens through a runner and keeps track of what its KV cache holds. Driver thread only."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._kv = CachedTokens(runner.opened.ctx)
        self._constraints: ConstraintCompiler | None = None

    def __len__(self) -> int:
        return len(self._kv)

    @property
    def room(self) -> int:
        """Positions left in the context."""
        return self._kv.capacity - len(self._kv)

    def constraints(self, tokenizer: Tokenizer) -> ConstraintCompiler:
        """The compiler of grammars for this tokenizer, made once: it costs a fifth of a second."""
        if self._constraints is None:
            self._constraints = ConstraintCompiler(tokenizer, self._runner.opened.model.config.vocab_size)
        return self._constraints

    def prefill(self, prompt: Sequence[int], cancel: CancelToken, on_prefill: OnPrefill | None) -> tuple[Floats, int]:
        """Logits [vocab_size] after the prompt, and how many of its tokens were already cached.

        Raises:
            ContextError: too long. Cancelled, StorageError, BackendError: what was computed so far stays cached.
        """
        if not prompt:
            raise UsageError("the prompt is empty: give at least one token")
        cached = self._kv.reuse(prompt)
        per_pass = self._runner.plan.prefill_tokens_per_pass
        self._runner.make_room(len(prompt), len(prompt) - cached)
        if on_prefill is not None:
            on_prefill(0, len(prompt) - cached)
        for start in range(cached, len(prompt), per_pass):
            stop = min(start + per_pass, len(prompt))
            batches = _micro_batches(start, stop, MICRO_BATCH_TOKENS)
            if stop == len(prompt):
                last = batches[-1]
                batches[-1] = MicroBatch(last.start, last.num_tokens, (last.num_tokens - 1,))
            self._forward(prompt[start:stop], batches, cancel)
            if on_prefill is not None:
                on_prefill(stop - cached, len(prompt) - cached)
        last_row: Floats = self._runner.backend.logits(len(batches) - 1)[0]
        return last_row, cached

    def step(self, token: int, cancel: CancelToken) -> Floats:
        """Logits [vocab_size] after one more token."""
        start, telemetry = perf_counter(), self._runner.telemetry
        if self._runner.lend(len(self._kv) + 1, cancel):
            telemetry.waited("weights on loan", start, perf_counter())
        telemetry.pass_s += perf_counter() - start
        self._forward([token], [MicroBatch(len(self._kv), 1, (0,))], cancel)
        row: Floats = self._runner.backend.logits(0)[0]
        return row

    def all_logits(self, tokens: Sequence[int], cancel: CancelToken) -> Floats:
        """Logits after every token, [len(tokens), vocab_size]; the cache is used and then forgotten."""
        model = self._runner.opened.model
        if len(tokens) > self._kv.capacity:
            self._kv.reuse(tokens)
        self._kv.clear()
        result = np.empty((len(tokens), model.config.vocab_size), dtype=np.float32)
        rows = logits_rows(model)
        self._runner.make_room(len(tokens), MICRO_BATCH_TOKENS)  # rows of logits need a prompt's room, however few
        for start in range(0, len(tokens), rows):
            stop = min(start + rows, len(tokens))
            batch = MicroBatch(start, stop - start, tuple(range(stop - start)))
            self._forward(tokens[start:stop], [batch], cancel)
            result[start:stop] = self._runner.backend.logits(0)
        self._kv.clear()
        return result

    def stepwise_logits(self, tokens: Sequence[int], cancel: CancelToken) -> Floats:
        """`all_logits`, each token by itself as when an answer is decoded."""
        first, _ = self.prefill(tokens[:1], cancel, None)
        rows = [first, *(self.step(token, cancel) for token in tokens[1:])]
        self._kv.clear()
        return np.stack(rows)

    def _forward(self, tokens: Sequence[int], batches: Sequence[MicroBatch], cancel: CancelToken) -> None:
        start = perf_counter()
        hidden = self._runner.table.rows(tokens, cancel)
        self._runner.telemetry.pass_s += perf_counter() - start
        while True:
            try:
                self._runner.scheduler.forward(batches, hidden, cancel)
                break
            except AllocationError:  # of a device on which somebody else needs memory too
                if not self._runner.shrink(len(self._kv)):
                    raise
                self._runner.backend.set_cancel(cancel)
        self._kv.append(tokens)


def generate(
    decoder: Decoder,
    runner: Runner,
    prompt: Sequence[int],
    config: GenerationConfig,
    cancel: CancelToken,
    emit: Callable[[Chunk], None],
    on_prefill: OnPrefill | None,
) -> Answer:
    """Generates until the model, a limit, a stop string or the caller ends it.

    Raises:
        ContextError, UsageError: the request cannot be met. StorageError, BackendError: the engine failed.
    """
    writer = _Writer(runner, config, emit)
    answer = writer.answer
    answer.prompt_tokens, answer.started_s = len(prompt), perf_counter()
    if len(prompt) >= runner.opened.ctx and config.max_tokens != 0:
        raise ContextError(
            f"prompt of {len(prompt)} tokens: the context of {runner.opened.ctx} leaves no room for an answer; "
            "shorten the prompt or raise --ctx",
            needed_tokens=len(prompt) + 1,
            available_tokens=runner.opened.ctx,
        )
    sampler, constraint = _make_sampler(runner, config), _make_constraint(decoder, runner, config)
    try:
        logits, answer.cached_tokens = decoder.prefill(prompt, cancel, on_prefill)
        sampler.accept_prompt(prompt)
        limit = decoder.room + 1 if config.max_tokens is None else min(config.max_tokens, decoder.room + 1)
        while len(answer.tokens) < limit:
            if constraint is not None:
                constraint.mask(logits)
            token = sampler.sample(logits)
            answer.first_token_s = answer.first_token_s or perf_counter()
            if not writer.take(token, logits, sampler):
                break
            sampler.accept(token)
            if constraint is not None:
                constraint.accept(token)
            if len(answer.tokens) < limit:
                logits = decoder.step(token, cancel)
        writer.finish()
    except Cancelled:
        answer.finish_reason = "cancelled"
        writer.finish()
    finally:
        sampler.close()
        answer.ended_s = perf_counter()
    return answer


def _make_sampler(runner: Runner, config: GenerationConfig) -> Sampler:
    opened = runner.opened
    vocab = getattr(opened.tokenizer, "vocab", None)  # only a GGUF's tokenizer has llama.cpp's vocabulary
    return Sampler(config.sampling, opened.model.config.vocab_size, vocab, context=opened.ctx)


def _make_constraint(decoder: Decoder, runner: Runner, config: GenerationConfig) -> Constraint | None:
    if config.json_schema is None and config.grammar is None:
        return None
    if runner.opened.tokenizer is None:
        raise UsageError("json_schema and grammar need a tokenizer, and this checkpoint brings none")
    return decoder.constraints(runner.opened.tokenizer).compile(json_schema=config.json_schema, grammar=config.grammar)


class _Writer:
    """Turns tokens into text: end-of-text tokens, stop strings and unfinished characters are dealt with here."""

    def __init__(self, runner: Runner, config: GenerationConfig, emit: Callable[[Chunk], None]) -> None:
        self.answer = Answer("", [], [])
        self._config = config
        self._emit = emit
        self._tokenizer = tokenizer = runner.opened.tokenizer
        self._eos = frozenset() if tokenizer is None or config.ignore_eos else tokenizer.eos_tokens
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer.token_bytes)
        self._stops = StopMatcher(config.stop)
        self._stopped = False

    def take(self, token: int, logits: Floats, sampler: Sampler) -> bool:
        """Adds a token; False when it ends the answer."""
        if token in self._eos:
            self.answer.finish_reason = "stop"
            return False
        self.answer.tokens.append(token)
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self._config.logprobs is not None:
            logprobs = (sampler.logprobs(logits, token, self._config.logprobs),)
            self.answer.logprobs += logprobs
        piece = self._detokenizer.push(token) if self._detokenizer is not None else ""
        text, stopped = self._stops.push(piece)
        self._write(Chunk(text=text, tokens=(token,), logprobs=logprobs))
        if stopped:
            self._stopped, self.answer.finish_reason = True, "stop"
        return not stopped

    def finish(self) -> None:
        """Emits what was held back for a stop string or an unfinished character."""
        if self._stopped:
            return
        tail = self._detokenizer.flush() if self._detokenizer is not None else ""
        text, stopped = self._stops.push(tail)
        text = text if stopped else text + self._stops.flush()
        if stopped:
            self.answer.finish_reason = "stop"
        if text:
            self._write(Chunk(text=text, tokens=()))

    def _write(self, chunk: Chunk) -> None:
        self.answer.text += chunk.text
        self._emit(chunk)


def _micro_batches(start: int, stop: int, size: int) -> list[MicroBatch]:
    return [MicroBatch(first, min(size, stop - first)) for first in range(start, stop, size)]
