"""The feed-forward of a layer with experts, as two stages: the router chooses, then what the experts returned is mixed.

Between the two, whoever runs the stages has the chosen experts brought and computed. What does not depend on the choice,
the shared expert, belongs to the second stage: it is computed while experts are on their way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from offload.kernels.ops import Ops, Routing, T
from offload.models.layers import FeedForward, Norm, Projection, join


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStage:
    """Chooses the experts of every token; the hidden states pass through."""

    name: str
    norm: Norm
    routing: Routing
    routes: ClassVar[bool] = True
    mixes: ClassVar[bool] = False
    attends: ClassVar[bool] = False

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.routing.layer

    @property
    def matrices(self) -> tuple[str, ...]:
        """Name of the router's matrix."""
        return (self.routing.router,)

    def forward(self, ops: Ops[T], x: T) -> T:
        """[num_tokens, hidden_size], unchanged."""
        ops.route(self.norm.apply(ops, x), self.routing)
        return x

    def foresee(self, ops: Ops[T], x: T, ahead: int) -> None:
        """Guesses the choice from the hidden states of an earlier router (Fate's cross-layer gate, arXiv 2502.12224)."""
        ops.foresee(self.norm.apply(ops, x), self.routing, ahead)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpert:
    """A feed-forward that every token passes through. `gate`: a projection to one number, whose sigmoid is its weight."""

    inner: FeedForward
    gate: Projection | None = None

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices in order of use."""
        return (*self.inner.matrices, *(() if self.gate is None else (self.gate.weight,)))

    def apply(self, ops: Ops[T], x: T) -> T:
        """[num_tokens, hidden_size] -> the same."""
        result = self.inner.apply(ops, x)
        return result if self.gate is None else ops.sigmoid_gate(result, self.gate.apply(ops, x))


@dataclass(frozen=True, slots=True, kw_only=True)
class MixStage:
    """Adds what the chosen experts, and the shared one, made of the normed hidden states."""

    name: str
    layer: int
    norm: Norm
    shared: SharedExpert | None = None
    residual_multiplier: float | None = None
    routes: ClassVar[bool] = False
    mixes: ClassVar[bool] = True
    attends: ClassVar[bool] = False

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices in order of use; the experts are not among them."""
        return () if self.shared is None else self.shared.matrices

    def forward(self, ops: Ops[T], x: T) -> T:
        """[num_tokens, hidden_size] -> the same."""
        shared = None if self.shared is None else self.shared.apply(ops, self.norm.apply(ops, x))
        mixed = ops.mix(self.layer)
        return join(ops, x, mixed if shared is None else ops.add(mixed, shared), None, self.residual_multiplier)
