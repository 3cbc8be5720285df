"""Whether reading ahead pays, decided by trial while tokens are made: some with, some without, and the faster way stays.

A wrong guess costs the link that a right demand may need. Whether that loses depends on model, cache, disk and text, so it
is measured where it matters, and again from time to time. What is computed does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

WARM_UP_TOKENS: Final = 16  # a cache that has just been filled tells nothing
STINT_TOKENS: Final = 4  # the first of each is not counted: it finds what the other way has left
TRIAL: Final = (True, False, False, True) * 3
HOLD_TOKENS: Final = 512


class Governor:
    """Told how long each token took; says whether the next one may read ahead.

    Args:
        fixed: True or False for always or never, None to try.
    """

    def __init__(self, fixed: bool | None = None) -> None:
        self._fixed = fixed
        self._choice = True
        self._until_trial = WARM_UP_TOKENS
        self._done = 0  # tokens of the trial
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    @property
    def allows(self) -> bool:
        """Whether the token at hand may read ahead."""
        if self._fixed is not None:
            return self._fixed
        return self._choice if self._until_trial else TRIAL[self._done // STINT_TOKENS]

    def passed(self, seconds: float) -> None:
        """The token at hand took so long."""
        if self._fixed is not None:
            return
        if self._until_trial:
            self._until_trial -= 1
            return
        if self._done % STINT_TOKENS:
            self._seconds[self.allows].append(seconds)
        self._done += 1
        if self._done == len(TRIAL) * STINT_TOKENS:
            self._choice = is_faster(self._seconds[True], self._seconds[False])
            self._seconds = {True: [], False: []}
            self._done, self._until_trial = 0, HOLD_TOKENS


def is_faster(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether tokens of the first kind took less time, in the middle."""
    return median(ours) < median(theirs)
