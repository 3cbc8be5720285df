"""What routers decided for a stretch of tokens, as arrays. Files of it are `trace_file`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int16]
NOBODY: Final = -1  # in place of an expert: the token did not reach the layer, or its router was not asked


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """Choices of experts, token by token.

    Attributes:
        model: fingerprint of the model, empty for synthetic routings. origin: where the tokens come from, for people.
        layers: numbers of the layers with experts. num_experts: of each layer.
        expert_bytes: of one expert, by layer. banks: by layer, which layers share slots (equal numbers).
        slot_bytes: memory of one expert, by layer. fixed_bytes: memory that a run needs beside experts.
        choices: int16 [tokens, layers, used], best first; `NOBODY` where a token did not reach the layer.
        passes: int32 [tokens], ascending: tokens of one number were computed together.
        foreseen: int16 [tokens, lookahead, layers, width]: at `[t, a, k]` what the router of layer `k` would have chosen,
            best first, given the hidden state `a + 1` layers with experts before it; may have no tokens.
    """

    model: str = ""
    origin: str = ""
    layers: tuple[int, ...]
    num_experts: int
    expert_bytes: tuple[int, ...]
    banks: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    fixed_bytes: int = 0
    choices: Ids
    passes: npt.NDArray[np.int32]
    foreseen: Ids = field(default_factory=lambda: np.zeros((0, 0, 0, 0), np.int16))

    @property
    def num_tokens(self) -> int:
        """Tokens of all passes."""
        return len(self.choices)

    @classmethod
    def joined(cls, parts: Sequence[RoutingTrace]) -> RoutingTrace:
        """Traces of one model, one after the other."""
        first = parts[0]
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in ("choices", "foreseen")
        }
        counts = np.cumsum([0, *(int(part.passes[-1]) + 1 if part.num_tokens else 0 for part in parts)])
        passes = np.concatenate([part.passes + count for part, count in zip(parts, counts, strict=False)])
        return replace(first, **arrays, passes=passes.astype(np.int32))

    def last(self, tokens: int) -> RoutingTrace:
        """The last so many tokens."""
        parts = {name: part[-tokens:] for name in ("choices", "passes", "foreseen") if len(part := getattr(self, name))}
        return replace(self, **parts)

    def of_bank(self, bank: int) -> RoutingTrace:
        """The layers of one bank. What other banks hold is nothing to it."""
        rows = list(self.rows_of_bank[bank])
        parts: dict[str, Any] = {
            name: tuple(getattr(self, name)[row] for row in rows)
            for name in ("layers", "expert_bytes", "banks", "slot_bytes")
        }
        foreseen = self.foreseen[:, :, rows] if len(self.foreseen) else self.foreseen
        return replace(self, **parts, choices=self.choices[:, rows], foreseen=foreseen)

    @property
    def num_used(self) -> int:
        """Experts of a token in a layer."""
        return int(self.choices.shape[2])

    @property
    def lookahead(self) -> int:
        """How many layers ahead routers were asked."""
        return int(self.foreseen.shape[1]) if len(self.foreseen) else 0

    @cached_property
    def rows_of_bank(self) -> Mapping[int, tuple[int, ...]]:
        """Indices into `layers` of those that share slots."""
        return {bank: tuple(np.flatnonzero(np.array(self.banks) == bank).tolist()) for bank in sorted(set(self.banks))}

    def slots(self, memory_bytes: int) -> dict[int, int]:
        """How many experts each bank holds in so many bytes, shared in proportion to what the banks could hold."""
        wanted = {
            bank: self.slot_bytes[rows[0]] * len(rows) * self.num_experts for bank, rows in self.rows_of_bank.items()
        }
        share = min(1.0, memory_bytes / sum(wanted.values()))
        return {bank: int(share * len(rows) * self.num_experts) for bank, rows in self.rows_of_bank.items()}

    def share(self, part: float) -> dict[int, int]:
        """How many experts each bank holds when there is room for this part of all."""
        return {bank: max(1, round(part * len(rows) * self.num_experts)) for bank, rows in self.rows_of_bank.items()}


def legible(text: str) -> str:
    """A text for people as one line of printable characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def effective_experts(trace: RoutingTrace) -> float:
    """How many equally popular experts would have the entropy of what was chosen, in the mean of the layers."""
    counts = []
    for row in range(len(trace.layers)):
        chosen = trace.choices[:, row].reshape(-1)
        shares = np.bincount(chosen[chosen >= 0], minlength=trace.num_experts) / max(1, (chosen >= 0).sum())
        used = shares[shares > 0]
        counts.append(float(np.exp(-(used * np.log(used)).sum())))
    return float(np.mean(counts))
