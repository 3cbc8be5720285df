"""The choice of the next token from logits, by llama.cpp's samplers in llama.cpp's order. Knows no model and no text.

    logit bias, repeat penalties, DRY | top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature, draw
                                      | temperature, mirostat         with mirostat=1 or 2
                                      | the largest                   at temperature 0

One thread at a time. The same seed, logits and accepted tokens give the same tokens.
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from offload.config import LEAST_TEMPERATURE, SamplingConfig
from offload.errors import BackendError, UsageError
from offload.models.text.llama import llama
from offload.results import Alternative, TokenLogprobs

Logits = npt.NDArray[np.float32]

CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
MIN_KEEP: Final = 0
MIROSTAT_M: Final = 100  # tokens from which mirostat 1 estimates the Zipf exponent, llama.cpp's value


class Sampler:
    """Samples by `config`. Penalties see what was given to `accept`: the prompt first, then every token as it is chosen.

    Args:
        config: names, order and defaults are llama.cpp's.
        vocab_size: length of the logits.
        vocab: llama.cpp's vocabulary (`GGUFTokenizer.vocab`); DRY needs it to find its sequence breakers.
        context: tokens that a window of -1 means.

    Attributes:
        seed: the seed in use; a random one where the config has none.

    Raises:
        UsageError: a bias for a token that does not exist, or DRY with sequence breakers and without `vocab`.
    """

    def __init__(self, config: SamplingConfig, vocab_size: int, vocab: Any = None, *, context: int = 4096) -> None:
        self.seed = secrets.randbelow(2**32 - 1) if config.seed is None else config.seed
        self._vocab_size = vocab_size
        self._window = _window(config, context)
        self._chain: Any = None
        self._excluded = frozenset(token for token, bias in config.logit_bias.items() if bias == -math.inf)
        stages = _adjusting(config, vocab_size, vocab, context)
        if len(self._excluded) == vocab_size:
            raise UsageError(f"logit_bias: it excludes all {vocab_size} tokens; leave one")
        if stages or not _is_greedy(config):
            self._chain = _chain([*stages, *_choosing(config, vocab_size, self.seed)])
            self._ids = np.arange(vocab_size, dtype=np.int32)
            self._candidates = np.zeros(vocab_size, dtype=CANDIDATE)
            self._array = llama.llama_token_data_array()

    def sample(self, logits: Logits) -> int:
        """The next token from float32 [vocab_size] logits, which are left as they are. -inf excludes a token.

        Raises:
            BackendError: a logit is not a number, or every token is excluded. UsageError: the bias excludes what was left.
        """
        assert logits.shape == (self._vocab_size,) and logits.dtype == np.float32, (logits.shape, logits.dtype)
        best = int(np.argmax(logits))
        if not math.isfinite(logits[best]):
            raise BackendError(
                f"logits: the largest of {self._vocab_size} is {logits[best]}, so no token can be chosen"
            )
        if best in self._excluded and not self._leaves_some(logits):
            raise UsageError("logit_bias: it excludes every token that could come next; leave one of them")
        return best if self._chain is None else self._apply(logits)

    def accept(self, token: int) -> None:
        """Tell the penalties that `token` now stands in the text."""
        if self._window and self._chain is not None:
            llama.llama_sampler_accept(self._chain, token)

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """`accept` for a whole prompt; only as many as the longest window matter."""
        for token in tokens[max(0, len(tokens) - self._window) :]:
            self.accept(token)

    def logprobs(self, logits: Logits, token: int, top: int) -> TokenLogprobs:
        """Natural-log probability of `token` and of the `top` most probable ones, before any filter or temperature."""
        largest = float(logits.max())
        total = math.log(float(np.exp(logits - largest, dtype=np.float32).sum(dtype=np.float64))) + largest
        count = min(top, self._vocab_size)
        best = np.argpartition(-logits, count - 1)[:count] if count else np.empty(0, dtype=np.int64)
        ordered = sorted((-float(logits[i]), int(i)) for i in best)
        alternatives = tuple(Alternative(index, -negated - total) for negated, index in ordered)
        return TokenLogprobs(token=token, logprob=float(logits[token]) - total, top=alternatives)

    def reset(self) -> None:
        """Forget accepted tokens and start the random sequence again at the seed."""
        if self._chain is not None:
            llama.llama_sampler_reset(self._chain)

    def close(self) -> None:
        """Free the samplers. Idempotent; `sample` may not be called afterwards."""
        chain, self._chain, self._vocab_size = self._chain, None, -1
        if chain is not None:
            llama.llama_sampler_free(chain)

    def _leaves_some(self, logits: Logits) -> bool:
        left = np.isfinite(logits)
        left[list(self._excluded)] = False
        return bool(left.any())

    def _apply(self, logits: Logits) -> int:
        self._candidates["id"] = self._ids  # samplers sort in place
        self._candidates["logit"] = logits
        array = self._array
        array.data = self._candidates.ctypes.data_as(llama.llama_token_data_p)
        array.size, array.selected, array.sorted = self._vocab_size, -1, False
        llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        assert 0 <= array.selected < array.size, (array.selected, array.size)
        return int(array.data[array.selected].id)


def _is_greedy(config: SamplingConfig) -> bool:
    return config.temperature < LEAST_TEMPERATURE  # mirostat at temperature 0 has one token to choose from


def _adjusting(config: SamplingConfig, vocab_size: int, vocab: Any, context: int) -> list[Any]:
    """The samplers that change logits whatever chooses: bias, penalties, DRY. Those that would do nothing are left out."""
    last_dry = _dry_window(config, context)
    breakers = [breaker.encode() for breaker in config.dry_sequence_breakers if breaker]
    if last_dry and breakers and vocab is None:
        raise UsageError(
            "dry_multiplier: sequence breakers need the tokenizer of a GGUF file; "
            "pass dry_sequence_breakers=() to use DRY without them"
        )
    stages = []
    if config.logit_bias:
        stages.append(_logit_bias(config, vocab_size))
    if last_n := _penalty_window(config, context):
        penalties = (config.repeat_penalty, config.frequency_penalty, config.presence_penalty)
        stages.append(llama.llama_sampler_init_penalties(vocab_size, last_n, *penalties))
    if last_dry:
        texts = (ctypes.c_char_p * len(breakers))(*breakers) if breakers else None
        shape = (config.dry_multiplier, config.dry_base, config.dry_allowed_length, last_dry)
        stages.append(llama.llama_sampler_init_dry(vocab, *shape, texts, len(breakers)))
    return stages


def _choosing(config: SamplingConfig, vocab_size: int, seed: int) -> list[Any]:
    """The samplers that narrow the choice and make it."""
    if _is_greedy(config):
        return [llama.llama_sampler_init_greedy()]
    temperature = llama.llama_sampler_init_temp_ext(config.temperature, 0.0, 1.0)
    tau, eta = config.mirostat_tau, config.mirostat_eta
    if config.mirostat == 1:
        return [temperature, llama.llama_sampler_init_mirostat(vocab_size, seed, tau, eta, MIROSTAT_M)]
    if config.mirostat == 2:
        return [temperature, llama.llama_sampler_init_mirostat_v2(seed, tau, eta)]
    return [
        llama.llama_sampler_init_top_n_sigma(config.top_n_sigma),
        llama.llama_sampler_init_top_k(config.top_k),
        llama.llama_sampler_init_typical(config.typical_p, MIN_KEEP),
        llama.llama_sampler_init_top_p(config.top_p, MIN_KEEP),
        llama.llama_sampler_init_min_p(config.min_p, MIN_KEEP),
        llama.llama_sampler_init_xtc(config.xtc_probability, config.xtc_threshold, MIN_KEEP, seed),
        temperature,
        llama.llama_sampler_init_dist(seed),
    ]


def _chain(stages: Sequence[Any]) -> Any:
    """A chain that owns `stages`."""
    parameters = llama.llama_sampler_chain_default_params()
    parameters.no_perf = True
    chain = llama.llama_sampler_chain_init(parameters)
    for stage in stages:
        llama.llama_sampler_chain_add(chain, stage)
    return chain


def _window(config: SamplingConfig, context: int) -> int:
    return max(_penalty_window(config, context), _dry_window(config, context))


def _penalty_window(config: SamplingConfig, context: int) -> int:
    neutral = config.repeat_penalty == 1 and config.frequency_penalty == 0 and config.presence_penalty == 0
    return 0 if neutral else _tokens(config.repeat_last_n, context)


def _dry_window(config: SamplingConfig, context: int) -> int:
    off = config.dry_multiplier == 0 or config.dry_base < 1
    return 0 if off else _tokens(config.dry_penalty_last_n, context)


def _tokens(last_n: int, context: int) -> int:
    """A window in tokens: -1 is the whole context, and no more than that is ever allocated."""
    return context if last_n < 0 else min(last_n, context)


def _logit_bias(config: SamplingConfig, vocab_size: int) -> Any:
    biases = (llama.llama_logit_bias * len(config.logit_bias))()
    for entry, (token, bias) in zip(biases, config.logit_bias.items(), strict=True):
        if not 0 <= token < vocab_size:
            raise UsageError(f"logit_bias: token {token} does not exist, the vocabulary has {vocab_size}")
        entry.token, entry.bias = int(token), float(bias)
    return llama.llama_sampler_init_logit_bias(vocab_size, len(biases), biases)
