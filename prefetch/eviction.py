"""Which expert makes room for another: pure policies over keys and numbers, without memory or I/O.

A policy learns from what tokens choose, whether it was in the cache or not, and is told what comes and goes. Asked for
victims, it names those of the held experts whose next use it expects last. What a known demand needs is not its business:
the cache passes that as `keep`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from offload.blocks import ExpertKey

Table = npt.NDArray[np.float64]
"""A number for every expert: [layers, experts]."""
Indices = npt.NDArray[np.int64]
"""Some experts, by their place in a table that is read row by row."""

_PASSING: Final = -1e300  # worth less than anything that a token has used


class Eviction(Protocol):
    """Knows what is in a cache, and what was used when. Keys are added and removed by the cache, never by the policy."""

    def chosen(self, layer: int, experts: Sequence[int]) -> None:
        """A token has reached `layer` and needs these experts, wherever they are."""
        ...

    def add(self, key: ExpertKey, *, passing: bool = False) -> None:
        """The cache now holds `key`. `passing`: no token has used it; until one does, it is the first to go."""
        ...

    def remove(self, key: ExpertKey) -> None:
        """The cache no longer holds `key`."""
        ...

    def victims(self, layer: int, count: int, keep: Iterable[ExpertKey]) -> list[ExpertKey]:
        """What should go while a token is at `layer`: up to `count` of what is held, none of `keep`, first to go first."""
        ...


class Ranking(Eviction, ABC):
    """Policies that give each expert a number, its worth; the lowest goes first.

    Args:
        layers: those whose experts share the cache, in order.
    """

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self._layers = tuple(layers)
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._held = np.zeros((len(layers), num_experts), dtype=bool)
        self._passing = np.zeros_like(self._held)

    def chosen(self, layer: int, experts: Sequence[int]) -> None:
        row, chosen = self._rows[layer], np.asarray(experts, dtype=np.int64)
        self._passing[row, chosen] = False
        self._learn(row, chosen)

    def add(self, key: ExpertKey, *, passing: bool = False) -> None:
        at = (self._rows[key.layer], key.expert)
        self._held[at] = True
        self._passing[at] = passing

    def remove(self, key: ExpertKey) -> None:
        self._held[self._rows[key.layer], key.expert] = False

    def victims(self, layer: int, count: int, keep: Iterable[ExpertKey]) -> list[ExpertKey]:
        allowed = self._held.copy()
        for kept, expert in keep:
            allowed[self._rows[kept], expert] = False
        found = np.flatnonzero(allowed)
        worth = self._worth(self._rows[layer], found)
        worth[self._passing.reshape(-1)[found]] = _PASSING
        if count < len(found):
            least = np.argpartition(worth, count)[:count]
            found, worth = found[least], worth[least]
        order = found[np.argsort(worth, kind="stable")]
        width = self._held.shape[1]
        return [ExpertKey(self._layers[index // width], index % width) for index in order.tolist()]

    @abstractmethod
    def _learn(self, row: int, experts: npt.NDArray[Any]) -> None:
        """A token chose these experts of a row of the table."""

    @abstractmethod
    def _worth(self, row: int, among: Indices) -> npt.NDArray[np.float64]:
        """The worth of some experts while a token is at a row; a new array."""


class LeastRecentlyUsed(Ranking):
    """What was not used for longest goes first."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        super().__init__(layers, num_experts)
        self._used: Table = np.zeros(self._held.shape)
        self._now = 0

    def _learn(self, row: int, experts: npt.NDArray[Any]) -> None:
        self._now += 1
        self._used[row, experts] = self._now

    def _worth(self, row: int, among: Indices) -> npt.NDArray[np.float64]:
        del row
        return self._used.reshape(-1)[among]


class LeastFrequentlyUsed(Ranking):
    """What was used least often since the start goes first; of those, what was not used for longest."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        super().__init__(layers, num_experts)
        self._count: Table = np.zeros(self._held.shape)
        self._used: Table = np.zeros(self._held.shape)
        self._now = 0

    def _learn(self, row: int, experts: npt.NDArray[Any]) -> None:
        self._now += 1
        self._count[row, experts] += 1
        self._used[row, experts] = self._now

    def _worth(self, row: int, among: Indices) -> npt.NDArray[np.float64]:
        del row
        worth: npt.NDArray[np.float64] = (self._count + self._used / (self._now + 1)).reshape(-1)[among]
        return worth


class Expected(Ranking):
    """Policies that know how likely each expert is chosen when a token next comes to its layer.

    A layer's next visit is as far away as the layers in between, so what is held for the layers ahead stays a little longer
    than what a token has just left behind. Worth is the expected wait, counted in layers, below zero.
    """

    def _worth(self, row: int, among: Indices) -> npt.NDArray[np.float64]:
        count, width = self._held.shape
        ahead = (among // width - row - 1) % count + 1
        worth: npt.NDArray[np.float64] = -(count / np.maximum(self._likely().reshape(-1)[among], 1e-9) + ahead)
        return worth

    @abstractmethod
    def _likely(self) -> Table:
        """How likely each expert is chosen at the next visit of its layer."""


class RecencyFrequency(Expected):
    """Each use counts, and counts half as much every `half_life` tokens: between LRU (short) and LFU (long).

    Lee et al., LRFU, IEEE Transactions on Computers 50(12), 2001; here time is counted in visits of the layer.

    Args:
        shallow: how many times as likely the first layer's experts are taken to be than the last one's, less one: early
            layers can be predicted least (Fate, arXiv 2502.12224).
    """

    def __init__(
        self, layers: Sequence[int], num_experts: int, *, half_life: float = 16.0, shallow: float = 0.0
    ) -> None:
        super().__init__(layers, num_experts)
        self._decay = 0.5 ** (1 / half_life)
        self._score: Table = np.zeros(self._held.shape)
        depth = np.arange(len(layers)) / max(1, len(layers) - 1)
        self._step = (1 - self._decay) * (1 + shallow * (1 - depth))

    def _learn(self, row: int, experts: npt.NDArray[Any]) -> None:
        self._score[row] *= self._decay
        self._score[row, experts] += self._step[row]

    def _likely(self) -> Table:
        return self._score


AGES: Final = 10  # classes of tokens since the last use: 1, 2 to 3, 4 to 7, ..
RATES: Final = 10  # classes of how often an expert is chosen, beside the mean of its layer
RATE_HALF_LIFE: Final = 64.0
FORGETTING: Final = 0.999


class HitDensity(Expected):
    """Counts how often experts of the same age and popularity were chosen at the next visit, and expects the same.

    What recency and frequency are worth is thereby learned from the model at hand, as in Beckmann et al., *LHD: Improving
    cache hit rate by maximizing hit density*, NSDI 2018.
    """

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        super().__init__(layers, num_experts)
        self._decay = 0.5 ** (1 / RATE_HALF_LIFE)
        self._age = np.full(self._held.shape, 1 << (AGES - 1))
        self._rate: Table = np.full(self._held.shape, 1 / num_experts)
        self._class = self._classes(self._age, self._rate)
        self._hits: Table = np.zeros(AGES * RATES)
        self._trials: Table = np.zeros(AGES * RATES)

    def _learn(self, row: int, experts: npt.NDArray[Any]) -> None:
        classes = self._class[row]
        self._hits *= FORGETTING
        self._trials *= FORGETTING
        self._hits += np.bincount(classes[experts], minlength=AGES * RATES)
        self._trials += np.bincount(classes, minlength=AGES * RATES)
        self._age[row] += 1
        self._age[row, experts] = 1
        self._rate[row] *= self._decay
        self._rate[row, experts] += (1 - self._decay) / len(experts)
        self._class[row] = self._classes(self._age[row], self._rate[row])

    @staticmethod
    def _classes(age: npt.NDArray[np.int64], rate: Table) -> npt.NDArray[np.int64]:
        """A number below AGES * RATES for each."""
        ages = np.minimum(np.log2(age).astype(np.int64), AGES - 1)
        relative = np.log2(np.maximum(rate * rate.shape[-1], 1e-3))
        rates = np.clip(np.floor(2 * relative).astype(np.int64) + RATES // 2, 0, RATES - 1)
        classes: npt.NDArray[np.int64] = ages * RATES + rates
        return classes

    def _likely(self) -> Table:
        # before anything is known of a class, a younger and a more popular expert is the likelier one
        ages, rates = np.divmod(np.arange(AGES * RATES), RATES)
        guess = 2.0 ** ((rates - RATES // 2) / 2 - ages / 2 - 2)
        likely = (self._hits + guess) / (self._trials + 1 + guess)
        table: Table = likely[self._class]
        return table


class OneBit(Expected):
    """Marks what was used; evicts what is unmarked, first what one bit says is not worth keeping, at random among equals.

    When all are marked, a new phase begins with none marked, which bounds the loss when the bits are wrong: Antoniadis et
    al., *Paging with succinct predictions*, ICML 2023. The bit says whether the expert waits longer than is usual.
    """

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        super().__init__(layers, num_experts)
        self._marked = np.zeros(self._held.shape, dtype=bool)
        self._bits = HitDensity(layers, num_experts)
        self._random: Table = np.random.default_rng(0).random(self._held.shape)

    def _learn(self, row: int, experts: npt.NDArray[Any]) -> None:
        self._bits.chosen(self._layers[row], experts.tolist())
        self._marked[row, experts] = True

    def _likely(self) -> Table:
        if self._marked[self._held].all():
            self._marked[:] = False
        likely = self._bits._likely()
        usual = np.median(likely[self._held]) if self._held.any() else 0.0
        ranks: Table = 4.0 * self._marked + 2.0 * (likely > usual) + self._random
        return ranks / 8


class Regret(Expected):
    """Mixes recency and frequency, and shifts weight away from whichever evicted what is then needed again.

    Vietri et al., *Driving cache replacement with ML-based LeCaR*, HotStorage 2018.
    """

    LEARNING_RATE: Final = 0.45

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        super().__init__(layers, num_experts)
        self._recent = RecencyFrequency(layers, num_experts, half_life=2)
        self._frequent = RecencyFrequency(layers, num_experts, half_life=256)
        self._weight = 0.5  # of recency
        self._blame: dict[ExpertKey, float] = {}

    def _learn(self, row: int, experts: npt.NDArray[Any]) -> None:
        layer, chosen = self._layers[row], experts.tolist()
        for expert in chosen:
            blame = self._blame.pop(ExpertKey(layer, expert), 0.0)
            if blame:
                recent = self._weight * np.exp(-self.LEARNING_RATE * max(blame, 0.0))
                frequent = (1 - self._weight) * np.exp(-self.LEARNING_RATE * max(-blame, 0.0))
                self._weight = float(np.clip(recent / (recent + frequent), 0.01, 0.99))
        self._recent.chosen(layer, chosen)
        self._frequent.chosen(layer, chosen)

    def remove(self, key: ExpertKey) -> None:
        at = (self._rows[key.layer], key.expert)
        if not self._passing[at]:
            # blame who thought less of it than the other did
            self._blame[key] = float(np.sign(self._frequent._likely()[at] - self._recent._likely()[at]))
        super().remove(key)

    def _likely(self) -> Table:
        mixed: Table = self._weight * self._recent._likely() + (1 - self._weight) * self._frequent._likely()
        return mixed
