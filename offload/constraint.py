"""Answers that must match a JSON schema or a grammar, by llguidance. Knows tokenizers only through their protocol.

A `ConstraintCompiler` belongs to a tokenizer and is expensive to make (a tree over the whole vocabulary); a `Constraint`
belongs to one answer and is cheap. llguidance is loaded when the first compiler is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from offload.errors import UsageError
from offload.models.text.base import Tokenizer

MAX_SOURCE_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 100


class Constraint:
    """What one answer may still say. `mask` before each choice, `accept` after it. One thread at a time.

    The end-of-text tokens are allowed exactly where the text so far is complete.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)

    def mask(self, logits: npt.NDArray[np.float32]) -> None:
        """Set the logit [vocab_size] of every token that cannot come next to -inf, in place.

        Raises:
            UsageError: the grammar proved too complex to follow.
        """
        assert logits.shape == (self._vocab_size,), (logits.shape, self._vocab_size)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        np.copyto(logits, np.float32(-np.inf), where=allowed == 0)

    def accept(self, token: int) -> None:
        """Go on behind `token`.

        Raises:
            UsageError: `token` is not allowed here.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can follow it."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"constraint: {_one_line(self._matcher.get_error())}")


class ConstraintCompiler:
    """Makes constraints for one tokenizer.

    Args:
        tokenizer: of either kind.
        vocab_size: length of the model's logits, which may exceed the tokenizer's.

    Raises:
        UsageError: the tokenizer names no token that ends a text, so a constrained answer could not end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        import llguidance

        if not tokenizer.eos_tokens:
            raise UsageError(
                "constraint: the tokenizer has no end-of-text token, so a constrained answer could not end"
            )
        self._library = llguidance
        self._vocab_size = vocab_size
        ends = sorted(tokenizer.eos_tokens)
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, ends[0]))
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=ends)

    def compile(self, *, json_schema: str | None = None, grammar: str | None = None) -> Constraint:
        """A constraint from one of the two.

        Args:
            json_schema: a JSON schema as text; `"{}"` is any JSON.
            grammar: Lark (as llguidance extends it) or GBNF, told apart by their look.

        Raises:
            UsageError: neither or both, too large, too deeply nested, or wrong; in llguidance's words.
        """
        if (json_schema is None) == (grammar is None):
            raise UsageError("json_schema and grammar: give one of the two")
        name, source = ("grammar", grammar) if grammar is not None else ("json_schema", json_schema or "")
        _check_size(name, source)
        try:
            is_grammar = grammar is not None
            compiled = self._library.grammar_from("grammar" if is_grammar else "json_schema", source)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{name}: {_one_line(str(error))}") from None
        matcher = self._library.LLMatcher(self._tokenizer, compiled, log_level=0)
        if matcher.is_error():
            raise UsageError(f"{name}: {_one_line(matcher.get_error())}")
        return Constraint(matcher, self._vocab_size)


class _Vocabulary:
    """A tokenizer in the terms of `llguidance.TokenizerWrapper`."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token
        self.bos_token_id = tokenizer.bos_token
        self.tokens: Sequence[bytes] = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = [token for token, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"), add_special=False, parse_special=False)


def _check_size(name: str, source: str) -> None:
    nbytes = len(source.encode(errors="replace"))
    if nbytes > MAX_SOURCE_BYTES:
        raise UsageError(f"{name}: {nbytes} bytes, at most {MAX_SOURCE_BYTES} allowed; simplify it")
    depth = 0
    for character in source:
        depth += (character in "[{(") - (character in "]})")
        if depth > MAX_DEPTH:
            raise UsageError(f"{name}: nested deeper than {MAX_DEPTH} levels; simplify it")


def _one_line(text: str) -> str:
    message, _, _ = text.partition("<backtrace>")  # of a panic, which llguidance hands on as any other error
    return " ".join(message.split())[:500]
