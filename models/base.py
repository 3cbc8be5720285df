"""What every architecture provides: stages that compute, matrices that move, vectors that stay.

A `Model` is a description. It holds no weights and runs nothing: the scheduler walks its stages, the residency table knows
where its matrices are, and a backend interprets the `Ops` calls of `Stage.forward`.

    matrices   large, stored as in the checkpoint, moved between tiers          name -> TensorInfo
    vectors    norms, biases, rope factors: tiny, float32, always resident      name -> Vector

Names are GGUF's (`blk.3.ffn_down.weight`), whatever the checkpoint calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from offload.kernels.ops import Ops, T
from offload.models.checkpoint.base import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """A small float32 vector: read from a tensor (plus `offset` on every element) or given as `values`."""

    tensor: TensorInfo | None = None
    offset: float = 0.0
    values: tuple[float, ...] = ()


class Stage(Protocol):
    """A piece of the forward pass between two points where weights may have to arrive.

    Attributes:
        name: `blk.3.attention`, `blk.3.feed_forward`, `head.0`.
        layer: index of the layer, -1 for the head.
        matrices: names of the matrices that `forward` uses, in order of use.
    """

    @property
    def name(self) -> str: ...

    @property
    def layer(self) -> int: ...

    @property
    def matrices(self) -> tuple[str, ...]: ...

    def forward(self, ops: Ops[T], x: T) -> T:
        """Hidden states [num_tokens, hidden_size] in and out; a head stage returns its slice of the logits."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a dense decoder, in the terms of Hugging Face's config.json.

    `sliding_windows[layer]` is the attention window of that layer or None; `embedding_scale` multiplies the looked-up rows.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint seen as something to run.

    Attributes:
        stages: attention and feed-forward of every layer in order, then the head in one or more parts by rows.
        parts: every matrix as the ranges of rows that move at once, at least one; see `models.parts`.
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

    @property
    def first_output_stage(self) -> int:
        """Index of the last layer's feed-forward: from here on, only rows whose logits are wanted are computed."""
        return len(self.stages) - self.head_parts - 1
