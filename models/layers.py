"""The stages that decoders are made of, configured by fields; `forward` reads in the order the data flows.

The order of operations is llama.cpp's, so that the same kernels give the same bits. Nothing here knows where weights come
from or how an operation is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from offload.kernels.ops import Activation, Attention, Ops, Rope, T


class Projection(NamedTuple):
    """A linear layer: names of its matrix and of its bias."""

    weight: str
    bias: str | None = None

    def apply(self, ops: Ops[T], x: T) -> T:
        """[num_tokens, in_features] -> [num_tokens, out_features]."""
        return ops.linear(x, self.weight, self.bias)


class Norm(NamedTuple):
    """An RMS norm (Zhang and Sennrich, arXiv 1910.07467): name of its vector, and epsilon."""

    weight: str
    eps: float

    def apply(self, ops: Ops[T], x: T) -> T:
        """Normalises the last dimension."""
        return ops.rms_norm(x, self.weight, self.eps)


class DenseStage:
    """A stage that has nothing to do with experts."""

    __slots__ = ()
    routes: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    attends: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionStage(DenseStage):
    """Self-attention with its residual connection.

    Attributes:
        qkv: projections to query, key and value; or a single fused one whose rows are the three in this order.
        query_norm, key_norm: norms over each head before the rotation; over all heads at once where `norms_whole`.
        rope: None in layers without position embedding.
        query_scale: factor on the rotated query; `attention.scale` is then 1. The same product in another order, kept
            apart because rounding differs.
        post_norm: norm of the block's output before it joins the residual.
        residual_multiplier: factor on the block's output before it joins the residual.
        is_last: keep only the rows whose logits are asked for; nothing after the last attention mixes tokens.
    """

    name: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: Norm
    qkv: tuple[Projection, ...]
    output: Projection
    attention: Attention
    attends: ClassVar[bool] = True
    rope: Rope | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    norms_whole: bool = False
    query_scale: float | None = None
    post_norm: Norm | None = None
    residual_multiplier: float | None = None
    is_last: bool = False

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices in order of use."""
        return (*(projection.weight for projection in self.qkv), self.output.weight)

    def forward(self, ops: Ops[T], x: T) -> T:
        """[num_tokens, hidden_size] -> the same; [num_outputs, hidden_size] from the last layer."""
        query, key, value = self._heads(ops, self.norm.apply(ops, x))
        if not self.norms_whole:
            query, key = self._normed(ops, query, key)
        if self.rope is not None:
            query, key = ops.rope(query, self.rope), ops.rope(key, self.rope)
        if self.query_scale is not None:
            query = ops.scale(query, self.query_scale)
        mixed = ops.attention(query, key, value, self.attention)
        x = join(ops, x, self.output.apply(ops, mixed), self.post_norm, self.residual_multiplier)
        return ops.output_rows(x) if self.is_last else x

    def _heads(self, ops: Ops[T], x: T) -> tuple[T, T, T]:
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        features = tuple(projection.apply(ops, x) for projection in self.qkv)
        if len(features) == 1:
            features = ops.split(features[0], [size * self.head_dim for size in sizes])
        query, key, value = features
        if self.norms_whole:
            query, key = self._normed(ops, query, key)
        query, key, value = (ops.heads(part, size) for part, size in zip((query, key, value), sizes, strict=True))
        return query, key, value

    def _normed(self, ops: Ops[T], query: T, key: T) -> tuple[T, T]:
        query = query if self.query_norm is None else self.query_norm.apply(ops, query)
        return query, key if self.key_norm is None else self.key_norm.apply(ops, key)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """A gated feed-forward block without norm and residual.

    Attributes:
        gate_up: projections to gate and up; or a single fused one whose rows are gate, then up.
    """

    intermediate_size: int
    gate_up: tuple[Projection, ...]
    down: Projection
    activation: Activation

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices in order of use."""
        return (*(projection.weight for projection in self.gate_up), self.down.weight)

    def apply(self, ops: Ops[T], x: T) -> T:
        """[num_tokens, hidden_size] -> the same."""
        features = tuple(projection.apply(ops, x) for projection in self.gate_up)
        if len(features) == 1:
            features = ops.split(features[0], [self.intermediate_size] * 2)
        gate, up = features
        return self.down.apply(ops, ops.glu(gate, up, self.activation))


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardStage(DenseStage):
    """Gated feed-forward block with its residual connection.

    Attributes:
        post_norm, residual_multiplier: as in `AttentionStage`.
    """

    name: str
    layer: int
    norm: Norm
    inner: FeedForward
    post_norm: Norm | None = None
    residual_multiplier: float | None = None

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices in order of use."""
        return self.inner.matrices

    def forward(self, ops: Ops[T], x: T) -> T:
        """[num_tokens, hidden_size] -> the same."""
        update = self.inner.apply(ops, self.norm.apply(ops, x))
        return join(ops, x, update, self.post_norm, self.residual_multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPart(DenseStage):
    """Logits of a range of the vocabulary. Every part repeats the final norm, which costs nothing beside its matrix."""

    name: str
    norm: Norm
    output: str
    logit_scale: float | None = None
    softcap: float | None = None
    layer: int = -1

    @property
    def matrices(self) -> tuple[str, ...]:
        """Name of the part's matrix."""
        return (self.output,)

    def forward(self, ops: Ops[T], x: T) -> T:
        """[num_outputs, hidden_size] -> [num_outputs, rows of the part]."""
        logits = ops.linear(self.norm.apply(ops, x), self.output)
        if self.logit_scale is not None:
            logits = ops.scale(logits, self.logit_scale)
        return logits if self.softcap is None else ops.softcap(logits, self.softcap)


def join(ops: Ops[T], residual: T, update: T, norm: Norm | None = None, multiplier: float | None = None) -> T:
    """A block's output, normed and scaled where the family does that, added to what went into the block."""
    if norm is not None:
        update = norm.apply(ops, update)
    if multiplier is not None:
        update = ops.scale(update, multiplier)
    return ops.add(update, residual)
