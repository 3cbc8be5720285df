"""What a text may cost, known before it is tokenized: bytes are counted in microseconds, tokens in seconds and gigabytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from offload.errors import ContextError, UsageError

MAX_TEXT_BYTES: Final = 64 * 1024 * 1024
_WHITESPACE: Final = b" \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class TextBound:
    """How few tokens a text can have.

    Attributes:
        longest: the most bytes of text that one token stands for, or None where nothing bounds them.
        strips: some tokens swallow the whitespace around them, so whitespace does not count.
    """

    longest: int | None
    strips: bool = False

    def least_tokens(self, data: bytes) -> int:
        """A number of tokens that `data`, in UTF-8, has at the least."""
        if self.longest is None:
            return 0
        counted = len(data.translate(None, _WHITESPACE)) if self.strips else len(data)
        return -(-counted // self.longest)

    def check(self, data: bytes, limit: int | None) -> None:
        """Refuse a text that is too long whatever its tokens turn out to be.

        Raises:
            ContextError: it has more than `limit` tokens.
            UsageError: it has more than `MAX_TEXT_BYTES` bytes.
        """
        if limit is not None and (least := self.least_tokens(data)) > limit:
            raise ContextError(
                f"text: {len(data)} bytes are at least {least} tokens, {limit} fit the context; "
                "shorten the text or raise the context length",
                needed_tokens=least,
                available_tokens=limit,
            )
        if len(data) > MAX_TEXT_BYTES:
            raise UsageError(f"text: {len(data)} bytes to tokenize, at most {MAX_TEXT_BYTES} allowed; shorten it")
