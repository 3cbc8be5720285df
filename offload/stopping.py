"""Stop strings in a text that arrives in pieces. Knows nothing of tokens.

text so far     "... the end\\n\\nUs"      stop "\\n\\nUser:"
emitted         "... the end"
held                          "\\n\\nUs"   could still become the stop string
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop string appears; the text ends before the stop string that ends first.

    Where two end at the same character, the longer one counts. Text that may yet be the beginning of a stop string is held
    back, never more than one character less than the longest of them.

    Args:
        stops: the strings; none may be empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would end every answer at once"
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text that can no longer be part of a stop string, and whether one was found. Nothing comes after it."""
        if self._stopped:
            return "", True
        text = self._held + text
        begin = self._first_match(text)
        if begin is not None:
            self._held, self._stopped = "", True
            return text[:begin], True
        keep = self._longest_prefix(text)
        emitted, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return emitted, False

    def flush(self) -> str:
        """What was held back, at the end of a text that did not stop."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Where the match that ends first begins."""
        found = ((text.find(stop), stop) for stop in self._stops)
        matches = [(begin + len(stop), begin) for begin, stop in found if begin >= 0]
        return min(matches)[1] if matches else None

    def _longest_prefix(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
