"""Whether something pays, decided by trial while tokens are made: some with it, some without, and the faster way stays.

Reading ahead: a wrong guess costs the link that a right demand may need, and any guess costs the processor. Computing beside
a device: the host's kernels and the copies share the memory. Whether that loses depends on model, machine and text, so it is
measured where it matters, and again from time to time. Before the first trial, an estimate decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

GUESS_S: Final = 1e-4
"""What a guess takes of the processor, about: where reading an expert takes less, there is nothing to gain."""
WARM_UP_TOKENS: Final = 64  # a cache that has just been filled tells nothing; the default policy's memory is as long
STINT_TOKENS: Final = 4  # the first of each is not counted: it finds what the other way has left
BLOCK: Final = (True, False, False, True)
MOST_BLOCKS: Final = 3
CLEAR: Final = 1.08  # times as fast: no more blocks are needed
HOLD_TOKENS: Final = 512
WAYS: Final = {"auto": None, "on": True, "off": False}
"""What a user may ask for: to try, always, never."""


class Governor:
    """Told how long each token took; says whether the next one may be made so.

    Args:
        fixed: True or False for always or never, None to try. prior: the way until the first trial has ended.
        beside: another one, during whose trial none begins: each would measure what the other does.
    """

    def __init__(self, fixed: bool | None = None, *, prior: bool = True, beside: Governor | None = None) -> None:
        self._fixed = fixed
        self._beside = beside
        self._choice = prior
        self._until_trial = WARM_UP_TOKENS
        self._done = 0  # tokens of the trial
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    @property
    def allows(self) -> bool:
        """Whether the token at hand may be made so."""
        if self._fixed is not None:
            return self._fixed
        return self._choice if self._until_trial else BLOCK[self._done // STINT_TOKENS % len(BLOCK)]

    @property
    def is_trying(self) -> bool:
        """Whether a trial is under way."""
        return self._fixed is None and not self._until_trial

    def passed(self, seconds: float) -> None:
        """The token at hand took so long."""
        if self._fixed is not None:
            return
        if self._until_trial:
            if self._until_trial > 1 or self._beside is None or not self._beside.is_trying:
                self._until_trial -= 1
            return
        if self._done % STINT_TOKENS:
            self._seconds[self.allows].append(seconds)
        self._done += 1
        blocks, rest = divmod(self._done, len(BLOCK) * STINT_TOKENS)
        if rest == 0:
            gain = times_as_fast(self._seconds[True], self._seconds[False])
            if blocks == MOST_BLOCKS or max(gain, 1 / gain) >= CLEAR:
                self._choice = gain > 1
                self._seconds = {True: [], False: []}
                self._done, self._until_trial = 0, HOLD_TOKENS


def pays_at_first(nbytes: int, bandwidth_bps: float) -> bool:
    """Whether experts of so many bytes are likely to be worth guessing, before anything was tried."""
    return nbytes / bandwidth_bps > GUESS_S


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """As the others are tokens of the first kind, in the middle."""
    return max(median(theirs), 1e-9) / max(median(ours), 1e-9)
