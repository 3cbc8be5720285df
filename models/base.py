"""What every architecture provides: stages that compute, matrices that move, vectors that stay.

A `Model` is a description. It holds no weights and runs nothing: the scheduler walks its stages, the residency table knows
where its matrices are, and a backend interprets the `Ops` calls of `Stage.forward`.

    matrices   large, stored as in the checkpoint, moved between tiers          name -> TensorInfo
    experts    feed-forwards of which a token needs a few, moved one by one     layer -> ExpertLayer
    vectors    norms, biases, rope factors: tiny, float32, always resident      name -> Vector

Names are GGUF's (`blk.3.ffn_down.weight`), whatever the checkpoint calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal, NamedTuple, Protocol, cast

from offload.blocks import Extent
from offload.kernels.ops import Activation, Attention, Ops, T
from offload.models.checkpoint.base import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """A small float32 vector: read from a tensor (plus `offset` on every element) or given as `values`.

    A tensor of two dimensions is one vector for each expert. Of each, every `step`-th element from `start` on is taken.
    `stacked`: read from several tensors of any one shape, of which each is a vector.
    """

    tensor: TensorInfo | None = None
    stacked: tuple[TensorInfo, ...] = ()
    offset: float = 0.0
    values: tuple[float, ...] = ()
    start: int = 0
    step: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """[length], or [num_experts, length], or [len(stacked), length]."""
        if self.stacked:
            return len(self.stacked), self.stacked[0].num_elements
        if self.tensor is None:
            return (len(self.values),)
        *outer, stored = self.tensor.shape
        return (*outer, len(range(self.start, stored, self.step)))


class Stage(Protocol):
    """A piece of the forward pass between two points where weights may have to arrive.

    Attributes:
        name: `blk.3.attention`, `blk.3.feed_forward`, `blk.3.router`, `blk.3.mix`, `head.0`.
        layer: index of the layer, -1 for the head.
        matrices: names of the matrices that `forward` uses, in order of use.
        routes, mixes: whether `forward` ends by choosing experts of its layer, or begins by needing what they returned.
        attends: whether `forward` looks at what the cache keeps of its layer.
    """

    @property
    def name(self) -> str: ...

    @property
    def layer(self) -> int: ...

    @property
    def matrices(self) -> tuple[str, ...]: ...

    @property
    def routes(self) -> bool: ...

    @property
    def mixes(self) -> bool: ...

    @property
    def attends(self) -> bool: ...

    def forward(self, ops: Ops[T], x: T) -> T:
        """Hidden states [num_tokens, hidden_size] in and out; a head stage returns its slice of the logits."""
        ...


class Attending(Stage, Protocol):
    """A stage that attends."""

    @property
    def attention(self) -> Attention: ...


class Router(Stage, Protocol):
    """A stage that ends by choosing experts. What it will choose can be guessed from hidden states of layers before it."""

    def foresee(self, ops: Ops[T], x: T, ahead: int) -> None: ...


class ExpertMatrices(NamedTuple):
    """The three matrices of one expert, [out_features, in_features] each."""

    gate: TensorInfo
    up: TensorInfo
    down: TensorInfo


class Stored(NamedTuple):
    """Experts that lie in a file as kernels do not compute with them, see `offload.unpacking`.

    Attributes:
        kind: how they are stored. extents: by expert, what has to be read for its matrices.
    """

    kind: Literal["transposed", "mxfp4_blocks"]
    extents: tuple[tuple[Extent, ...], ...]


class ExpertBiases(NamedTuple):
    """Names of vectors [num_experts, out_features] that are added to the products with an expert's matrices."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """The experts of a layer: gated feed-forwards of one shape, of which the router chooses a few for each token.

    Attributes:
        experts: the matrices of each, as kernels want them. num_used: how many a token needs.
        stored: how they lie in the file instead, or None; the extents of `experts` then only tell sizes.
        biases: always resident, as all vectors; or None.
    """

    layer: int
    num_used: int
    activation: Activation
    experts: tuple[ExpertMatrices, ...]
    biases: ExpertBiases | None = None
    stored: Stored | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder, in the terms of Hugging Face's config.json.

    `sliding_windows[layer]` is the attention window of that layer or None; `embedding_scale` multiplies the looked-up rows.
    `head_dim` is of queries and keys; `value_dim` of values, None where it is the same. Where values are the leading
    features of keys (`shares_values`), the cache keeps keys only.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    sliding_windows: tuple[int | None, ...]
    embedding_scale: float = 1.0
    value_dim: int | None = None
    shares_values: bool = False

    @property
    def cache_dims(self) -> tuple[int, ...]:
        """Features of a head in each tensor that the cache keeps for a layer: of keys, and of values where they are kept."""
        value = self.head_dim if self.value_dim is None else self.value_dim
        return (self.head_dim,) if self.shares_values else (self.head_dim, value)

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """The same of all heads together."""
        return tuple(self.num_kv_heads * dims for dims in self.cache_dims)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint seen as something to run.

    Attributes:
        stages: attention and feed-forward of every layer in order, then the head in one or more parts by rows. With
            experts, a feed-forward is two stages: one that chooses them, and one that mixes what they return.
        parts: every matrix as the ranges of rows that move at once, at least one; see `models.parts`.
        experts: by layer, where there are any.
        embedding: the token table, read row by row and dequantized outside of the graph.
        head_parts: number of trailing stages that form the head; their outputs, concatenated, are the logits.
    """

    config: ModelConfig
    stages: tuple[Stage, ...]
    matrices: Mapping[str, TensorInfo]
    parts: Mapping[str, tuple[TensorInfo, ...]]
    vectors: Mapping[str, Vector]
    embedding: TensorInfo
    head_parts: int
    experts: Mapping[int, ExpertLayer] = field(default_factory=dict)

    def all_matrices(self) -> list[TensorInfo]:
        """The matrices, and those of one expert of each layer."""
        return [*self.matrices.values(), *(matrix for layer in self.experts.values() for matrix in layer.experts[0])]

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Of all layers, in order."""
        return tuple(cast(Attending, stage).attention for stage in self.stages if stage.attends)

    @cached_property
    def routers(self) -> Mapping[int, Router]:
        """The stages that choose experts, by layer, in order."""
        return {stage.layer: cast(Router, stage) for stage in self.stages if stage.routes}

    def routers_behind(self, layer: int, count: int) -> tuple[Router, ...]:
        """Up to `count` of them behind that of `layer`, the nearest first."""
        return tuple(islice((router for number, router in self.routers.items() if number > layer), count))

    @property
    def first_output_stage(self) -> int:
        """Index of the last layer's feed-forward: from here on, only rows whose logits are wanted are computed."""
        return len(self.stages) - self.head_parts - (2 if self.config.num_layers - 1 in self.experts else 1)
