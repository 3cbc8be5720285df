"""What a token will choose in the layers ahead: pure predictors over routing, without weights and without I/O.

A predictor is told each layer's choice as it is made, and asked for the layers behind it before theirs is.

    gate         the routers ahead applied to this layer's hidden state, computed by the backend (Fate, arXiv 2502.12224)
    affinity     what was chosen ahead when this layer chose the same (ExFlow, arXiv 2401.08383)
    popularity   what the layer ahead chooses often
    previous     what it chose for the token before
    blend        all of these, weighed by what each was worth so far
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
"""How likely each expert of a layer is taken to be; any monotonic scale."""
Experts = Sequence[int] | npt.NDArray[np.int16]

_TINY: Final = 1e-4


class Predictor(Protocol):
    """Rows are the layers with experts, in order, counted from 0."""

    def chosen(self, row: int, experts: Experts) -> None:
        """The token at hand has chosen."""
        ...

    def predict(self, row: int, ahead: int, foreseen: Experts) -> Scores:
        """Scores of the experts of row `row + ahead`, after `row` has chosen.

        Args:
            foreseen: what the router ahead made of the hidden state at `row`, best first; empty where it was not asked.
        """
        ...


class Gate:
    """The order in which the router ahead puts its experts."""

    def __init__(self, rows: int, num_experts: int) -> None:
        del rows
        self._num_experts = num_experts

    def chosen(self, row: int, experts: Experts) -> None:
        """Nothing is learned."""

    def predict(self, row: int, ahead: int, foreseen: Experts) -> Scores:
        del row, ahead
        scores = np.zeros(self._num_experts)
        scores[np.asarray(foreseen, dtype=np.int64)] = np.arange(len(foreseen), 0, -1)
        return scores


class Popularity:
    """Each choice counts, half as much `half_life` tokens later."""

    def __init__(self, rows: int, num_experts: int, half_life: float = 64.0) -> None:
        self._decay = 0.5 ** (1 / half_life)
        self._score = np.zeros((rows, num_experts))

    def chosen(self, row: int, experts: Experts) -> None:
        self._score[row] *= self._decay
        self._score[row, experts] += 1 - self._decay

    def predict(self, row: int, ahead: int, foreseen: Experts) -> Scores:
        del foreseen
        scores: Scores = self._score[row + ahead]
        return scores


class Previous(Popularity):
    """What the layer chose for the token before; of the others, what it chose last."""

    def __init__(self, rows: int, num_experts: int) -> None:
        super().__init__(rows, num_experts, half_life=1.0)


class Affinity:
    """Counts pairs of choices, in a layer and in one ahead of it; old pairs fade.

    Args:
        lookahead: pairs of layers at most so far apart are counted.
    """

    def __init__(self, rows: int, num_experts: int, lookahead: int = 3, half_life: float = 256.0) -> None:
        self._decay = 0.5 ** (1 / half_life)
        self._pairs = np.zeros((lookahead, rows, num_experts, num_experts), dtype=np.float32)
        self._current: list[Experts] = []
        self._row = -1

    def chosen(self, row: int, experts: Experts) -> None:
        if row <= self._row:
            self._current = []
        self._current.append(experts)
        self._row = row
        for ahead in range(1, min(len(self._pairs), len(self._current) - 1) + 1):
            earlier = np.asarray(self._current[-1 - ahead])
            pairs = self._pairs[ahead - 1, row - ahead]
            pairs[earlier] *= self._decay
            pairs[earlier[:, None], np.asarray(experts)] += np.float32(1 - self._decay)

    def predict(self, row: int, ahead: int, foreseen: Experts) -> Scores:
        del foreseen
        chances = self._pairs[ahead - 1, row][np.asarray(self._current[-1])]
        scores: Scores = chances.mean(axis=0, dtype=np.float64)
        return scores


class Blend:
    """A logistic regression over what the others say, fitted as tokens pass: Robbins and Monro's stochastic gradient."""

    RATE: Final = 0.3

    def __init__(self, rows: int, num_experts: int, lookahead: int = 3) -> None:
        self._affinity = Affinity(rows, num_experts, lookahead)
        self._others = (Popularity(rows, num_experts), Previous(rows, num_experts), self._affinity)
        self._num_experts = num_experts
        self._rank_hits = np.full(
            (lookahead, num_experts + 1), 0.5
        )  # how often the gate's n-th was chosen; last: unnamed
        self._weights = np.tile(np.array([0.5, 0.1, 0.1, 0.3, 0.0]), (lookahead, 1))
        self._asked: dict[int, list[tuple[int, Scores, npt.NDArray[np.int64]]]] = {}

    def chosen(self, row: int, experts: Experts) -> None:
        truth = np.zeros(self._num_experts)
        truth[experts] = 1
        for ahead, features, ranks in self._asked.pop(row, ()):
            self._rank_hits[ahead - 1, ranks] += 0.01 * (truth - self._rank_hits[ahead - 1, ranks])
            guess = 1 / (1 + np.exp(-self._weights[ahead - 1] @ features))
            self._weights[ahead - 1] += self.RATE * features @ (truth - guess) / self._num_experts
        for other in self._others:
            other.chosen(row, experts)

    def predict(self, row: int, ahead: int, foreseen: Experts) -> Scores:
        ranks = np.full(self._num_experts, self._num_experts)
        ranks[np.asarray(foreseen, dtype=np.int64)] = np.arange(len(foreseen))
        chances = [self._rank_hits[ahead - 1, ranks], *(other.predict(row, ahead, foreseen) for other in self._others)]
        clipped = np.clip(np.array(chances), _TINY, 1 - _TINY)
        features = np.vstack([np.log(clipped / (1 - clipped)), np.ones(self._num_experts)])
        self._asked.setdefault(row + ahead, []).append((ahead, features, ranks))
        scores: Scores = self._weights[ahead - 1] @ features
        return scores


class Perfect:
    """A control: knows the choices beforehand. Told them by `know`."""

    def __init__(self, rows: int, num_experts: int) -> None:
        self._truth: npt.NDArray[np.float64] = np.zeros((rows, num_experts))

    def know(self, choices: npt.NDArray[np.int16]) -> None:
        """The choices of the token to come, [rows, num_used]."""
        self._truth[:] = 0
        np.put_along_axis(self._truth, choices.astype(np.int64), 1.0, axis=1)

    def chosen(self, row: int, experts: Experts) -> None:
        """Nothing is learned."""

    def predict(self, row: int, ahead: int, foreseen: Experts) -> Scores:
        del foreseen
        scores: Scores = self._truth[row + ahead]
        return scores


class Chance:
    """A control: guesses."""

    def __init__(self, rows: int, num_experts: int, seed: int = 0) -> None:
        del rows
        self._random = np.random.default_rng(seed)
        self._num_experts = num_experts

    def chosen(self, row: int, experts: Experts) -> None:
        """Nothing is learned."""

    def predict(self, row: int, ahead: int, foreseen: Experts) -> Scores:
        del row, ahead, foreseen
        return self._random.random(self._num_experts)


PREDICTORS: Final[Mapping[str, Callable[[int, int], Predictor]]] = {
    "gate": Gate,
    "affinity": Affinity,
    "popularity": Popularity,
    "previous": Previous,
    "blend": Blend,
    "perfect": Perfect,
    "chance": Chance,
}
"""By name; the last two are controls. Made from the number of layers with experts and of experts in each."""
