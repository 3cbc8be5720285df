"""Latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one small vector for each token.

Where a file holds the matrices that unfold it head by head, they are applied to the query and to the result instead, and the
cache keeps nothing but the small vector and one rotated key. Where it holds them as one, keys and values are unfolded and
kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from offload.kernels.ops import Attention, Ops, Rope, T
from offload.models.assembly import Assembly
from offload.models.layers import DenseStage, Norm, Projection, join


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """Sizes of latent attention, in features.

    Attributes:
        plain, rotated: parts of a head of queries and keys. value: of a head of values. rank: of the latent vector.
        query_rank: of the queries' own latent vector; None where they are projected in one step.
        absorbed: the file holds the unfolding matrices head by head.
    """

    plain: int
    rotated: int
    value: int
    rank: int
    query_rank: int | None
    absorbed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionStage(DenseStage):
    """Self-attention with its residual connection.

    Attributes:
        query: the projection; or two, with `query_norm` between them.
        latent: projection to the latent vector and the rotated key that all heads share.
        unfold: one matrix that makes plain keys and values of all heads; or the names of one for each head that brings plain
            queries into the latent space, and of one that brings results out of it.
        is_last: as in `AttentionStage`.
    """

    name: str
    layer: int
    num_heads: int
    shape: LatentShape
    norm: Norm
    query: tuple[Projection, ...]
    query_norm: Norm | None
    latent: Projection
    latent_norm: Norm
    unfold: Projection | tuple[str, str]
    output: Projection
    attention: Attention
    attends: ClassVar[bool] = True
    rope: Rope
    is_last: bool = False

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices in order of use."""
        queries = tuple(projection.weight for projection in self.query)
        unfold = (self.unfold.weight,) if isinstance(self.unfold, Projection) else self.unfold
        return (*queries, self.latent.weight, *unfold, self.output.weight)

    def forward(self, ops: Ops[T], x: T) -> T:
        """[num_tokens, hidden_size] -> the same; [num_outputs, hidden_size] from the last layer."""
        normed, shape = self.norm.apply(ops, x), self.shape
        query = self.query[0].apply(ops, normed)
        if self.query_norm is not None:
            query = self.query[1].apply(ops, self.query_norm.apply(ops, query))
        plain, rotated = ops.split(ops.heads(query, self.num_heads), [shape.plain, shape.rotated])
        latent, key = ops.split(self.latent.apply(ops, normed), [shape.rank, shape.rotated])
        key, rotated = ops.rope(ops.heads(key, 1), self.rope), ops.rope(rotated, self.rope)
        mixed = self._attend(ops, plain, rotated, self.latent_norm.apply(ops, latent), key)
        x = join(ops, x, self.output.apply(ops, mixed))
        return ops.output_rows(x) if self.is_last else x

    def _attend(self, ops: Ops[T], plain: T, rotated: T, latent: T, key: T) -> T:
        if isinstance(self.unfold, Projection):
            unfolded = ops.heads(self.unfold.apply(ops, latent), self.num_heads)
            keys, values = ops.split(unfolded, [self.shape.plain, self.shape.value])
            return ops.attention(ops.concat(plain, rotated), ops.concat(keys, key), values, self.attention)
        into, out = self.unfold
        query = ops.concat(ops.linear_heads(plain, into), rotated)
        value = ops.heads(latent, 1)
        mixed = ops.attention(query, ops.concat(value, key), value, self.attention)
        return ops.flat(ops.linear_heads(ops.heads(mixed, self.num_heads), out))


def add_latent_attention(parts: Assembly, layer: int, shape: LatentShape, *, rope: Rope, scale: float) -> None:
    """Appends the attention of a layer.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    prefix, hidden, heads = f"blk.{layer}.", parts.shape.hidden_size, parts.shape.num_heads
    query, query_norm = _query(parts, prefix, shape, heads * (shape.plain + shape.rotated))
    unfold: Projection | tuple[str, str]
    if shape.absorbed:
        unfold = (
            parts.projection_heads(f"{prefix}attn_k_b.weight", shape.rank, shape.plain),
            parts.projection_heads(f"{prefix}attn_v_b.weight", shape.value, shape.rank),
        )
    else:
        unfold = parts.projection(f"{prefix}attn_kv_b", heads * (shape.plain + shape.value), shape.rank)
    stage = LatentAttentionStage(
        name=f"{prefix}attention",
        layer=layer,
        num_heads=heads,
        shape=shape,
        norm=parts.norm(f"{prefix}attn_norm.weight"),
        query=query,
        query_norm=query_norm,
        latent=parts.projection(f"{prefix}attn_kv_a_mqa", shape.rank + shape.rotated, hidden),
        latent_norm=parts.norm(f"{prefix}attn_kv_a_norm.weight", shape.rank),
        unfold=unfold,
        output=parts.projection(f"{prefix}attn_output", hidden, heads * shape.value),
        attention=Attention(layer=layer, scale=scale),
        rope=rope,
        is_last=layer == parts.shape.num_layers - 1,
    )
    parts.add(stage)


def _query(parts: Assembly, prefix: str, shape: LatentShape, width: int) -> tuple[tuple[Projection, ...], Norm | None]:
    hidden, rank = parts.shape.hidden_size, shape.query_rank
    if rank is None:
        return (parts.projection(f"{prefix}attn_q", width, hidden),), None
    down, up = parts.projection(f"{prefix}attn_q_a", rank, hidden), parts.projection(f"{prefix}attn_q_b", width, rank)
    return (down, up), parts.norm(f"{prefix}attn_q_a_norm.weight", rank)
