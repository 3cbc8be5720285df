"""The operations that a model definition is written in, and the batch it runs on.

A model is written once against `Ops` and run by several backends: the ggml backend records the calls as a graph, the torch
backend executes them. Handles are opaque to the model: whatever the backend returns is passed back to it.

Shapes are given outermost first: an activation is `[num_tokens, features]`, a weight `[out_features, in_features]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeVar

T = TypeVar("T")

Activation = Literal["silu", "gelu_tanh", "gelu", "swiglu_oai"]
"""Of a gated unit. "swiglu_oai" is gpt-oss's: both halves clamped, one added to the upper one; see `SWIGLU_ALPHA`."""
SWIGLU_ALPHA: Final = 1.702
SWIGLU_LIMIT: Final = 7.0
"""`min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up, -limit, limit) + 1)` (gpt-oss, arXiv 2508.10925)."""
Scoring = Literal["softmax", "sigmoid", "softmax_of_chosen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding of one layer (Su et al., RoFormer, arXiv 2104.09864).

    Attributes:
        dims: leading features of each head that are rotated.
        theta: base of the geometric progression of frequencies.
        interleaved: pairs are neighbours (2i, 2i+1), as in GGUF llama files; otherwise halves (i, i + dims/2), as in
            Hugging Face checkpoints.
        frequency_scale: factor on every angle (linear position interpolation; 1/8 stretches the context eightfold).
        factors: name of a vector [dims/2] of divisors of the frequencies (llama 3 and longrope scaling), or None.
        magnitude: factor on the rotated vectors (attention factor of YaRN and longrope).
    """

    dims: int
    theta: float
    interleaved: bool = False
    frequency_scale: float = 1.0
    factors: str | None = None
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention of one layer over its KV cache.

    Attributes:
        layer: index of the layer, and of its KV cache.
        scale: factor on the query-key products.
        window: a query at position p sees keys at positions in (p - window, p]; None sees all up to p.
        softcap: scores become `softcap * tanh(score / softcap)` before the softmax; None leaves them.
        sinks: name of a vector [num_heads] of scores that take part in each head's softmax and carry no value; or None.
    """

    layer: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a layer chooses experts for a token (Shazeer et al., arXiv 1701.06538; DeepSeek-V3, arXiv 2412.19437).

    Attributes:
        layer: index of the layer, under which the choice is kept.
        router: name of the matrix [num_experts, hidden_size]. bias: of the vector that is added to its product, or None.
        num_used: experts chosen for each token.
        scoring: how products become scores, which are also the weights of what the experts return. "softmax_of_chosen"
            compares the products themselves, and takes the softmax over those of the chosen.
        selection_bias: name of a vector that is added to scores while they are compared, but not to weights; or None.
        num_groups, groups_used: experts in equal groups in order; only those of the best groups are compared.
        group_top: how many of its best scores, added, are a group's score.
        normalise: divides the weights by their sum. scale: a factor on them after that.
    """

    layer: int
    router: str
    num_experts: int
    num_used: int
    scoring: Scoring = "softmax"
    bias: str | None = None
    selection_bias: str | None = None
    num_groups: int = 1
    groups_used: int = 1
    group_top: int = 2
    normalise: bool = False
    scale: float = 1.0


class Ops(Protocol[T]):
    """One backend's operations for one batch. All results are float32 unless the backend's documentation says otherwise."""

    def linear(self, x: T, weight: str, bias: str | None = None) -> T:
        """`x @ weight.T + bias`: [num_tokens, in_features] -> [num_tokens, out_features]."""
        ...

    def rms_norm(self, x: T, weight: str | None, eps: float) -> T:
        """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension, of any rank."""
        ...

    def add(self, a: T, b: T) -> T:
        """Elementwise sum of equal shapes."""
        ...

    def scale(self, x: T, factor: float) -> T:
        """`x * factor`."""
        ...

    def softcap(self, x: T, cap: float) -> T:
        """`cap * tanh(x / cap)`."""
        ...

    def split(self, x: T, sizes: Sequence[int]) -> tuple[T, ...]:
        """Consecutive slices of the last dimension: [.., sum(sizes)] -> [.., size] each."""
        ...

    def heads(self, x: T, num_heads: int) -> T:
        """[num_tokens, num_heads * head_dim] -> [num_tokens, num_heads, head_dim]."""
        ...

    def concat(self, a: T, b: T) -> T:
        """[num_tokens, num_heads, m] and [num_tokens, num_heads or 1, n] -> [num_tokens, num_heads, m + n]."""
        ...

    def linear_heads(self, x: T, weight: str) -> T:
        """Each head by a matrix of its own, [num_heads, out_features, in_features]: [num_tokens, num_heads, in_features] ->
        [num_tokens, num_heads, out_features]."""
        ...

    def flat(self, x: T) -> T:
        """[num_tokens, num_heads, head_dim] -> [num_tokens, num_heads * head_dim]."""
        ...

    def rope(self, x: T, rope: Rope) -> T:
        """Rotates [num_tokens, num_heads, head_dim] by the positions of the batch."""
        ...

    def attention(self, query: T, key: T, value: T, attention: Attention) -> T:
        """Stores key and value at the batch's positions, then attends.

        Query is [num_tokens, num_heads, head_dim], key [num_tokens, num_kv_heads, head_dim], and value [num_tokens,
        num_kv_heads, value_dim]; heads are grouped when num_heads is a multiple of num_kv_heads. Where the model's cache
        keeps no values, they must be the leading features of keys. Returns [num_tokens, num_heads * value_dim].
        """
        ...

    def glu(self, gate: T, up: T, activation: Activation) -> T:
        """`activation(gate) * up`, elementwise (Shazeer, arXiv 2002.05202); see `Activation`."""
        ...

    def sigmoid_gate(self, x: T, gate: T) -> T:
        """`x * sigmoid(gate)`: [num_tokens, features] and [num_tokens, 1] -> [num_tokens, features]."""
        ...

    def route(self, x: T, routing: Routing) -> None:
        """Chooses experts for each token of x [num_tokens, hidden_size]; both are kept for `mix` of the same layer."""
        ...

    def foresee(self, x: T, routing: Routing, ahead: int) -> None:
        """Which experts the router of a layer to come would choose if its hidden states were x [num_tokens, hidden_size].

        Kept for whoever reads ahead; nothing else depends on it. `ahead`: how many layers with experts it is away.
        """
        ...

    def mix(self, layer: int) -> T:
        """What the chosen experts returned for their tokens, weighted and added in the order of the choice.

        [num_tokens, hidden_size]. Between `route` and `mix`, whoever runs the stages has the experts computed.
        """
        ...

    def output_rows(self, x: T) -> T:
        """The rows whose logits the batch asks for: [num_tokens, features] -> [num_outputs, features]."""
        ...
