"""Which tokens the KV cache holds. The rows themselves are the backend's."""

from __future__ import annotations

from collections.abc import Sequence

from offload.errors import ContextError


class CachedTokens:
    """The tokens at positions 0, 1, ... of a cache of `capacity` positions."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._tokens: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keeps the longest common prefix with `prompt`, short of its last token, and returns its length.

        The last token is always computed again, because its logits are wanted.

        Raises:
            ContextError: the prompt is longer than the cache.
        """
        if len(prompt) > self.capacity:
            raise ContextError(
                f"prompt of {len(prompt)} tokens: the context holds {self.capacity}; shorten it or raise --ctx",
                needed_tokens=len(prompt),
                available_tokens=self.capacity,
            )
        length = 0
        for ours, theirs in zip(self._tokens, prompt[:-1], strict=False):
            if ours != theirs:
                break
            length += 1
        del self._tokens[length:]
        return length

    def append(self, tokens: Sequence[int]) -> None:
        """These tokens have been computed at the next positions."""
        assert len(self._tokens) + len(tokens) <= self.capacity
        self._tokens += tokens

    def clear(self) -> None:
        """Forgets everything."""
        self._tokens.clear()
