"""Bytes of tokens to text while it grows: nothing is shown before it is whole. Knows no tokenizer, only bytes."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class IncrementalDetokenizer:
    """Turns tokens into text one at a time; a character split over tokens comes out with its last byte.

    All pieces and the flush together are `bytes.decode("utf-8", errors="replace")` of all bytes. At most three bytes are
    held back.

    Args:
        token_bytes: the bytes that a token adds, `Tokenizer.token_bytes`.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that `token` completes, possibly none."""
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        """The end of the text: a replacement character where a character stayed unfinished. Ready for a new text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
