"""In which order a stage uses its matrices, and where among them it attends: found by running it on nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offload.models.base import Stage


class _Nothing:
    """Operations that note what they are asked for. Handles are opaque to stages, so one serves as all."""

    def __init__(self) -> None:
        self.order: list[str | None] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **_: self._note(name, given)

    def _note(self, name: str, given: Sequence[Any]) -> object:
        if name in ("linear", "linear_heads"):
            self.order.append(given[1])
        elif name == "route":
            self.order.append(given[1].router)
        elif name == "attention":
            self.order.append(None)
        return (self,) * len(given[1]) if name == "split" else self


def order_of(stage: Stage) -> tuple[str | None, ...]:
    """The stage's matrices in order of use, as `stage.matrices`; None where it attends."""
    nothing = _Nothing()
    stage.forward(nothing, nothing)
    return tuple(nothing.order)
