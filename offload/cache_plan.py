"""How much of the KV cache memory holds, and which layers pass through a ring from disk instead. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from offload.errors import BudgetError
from offload.units import format_size

RING_TABLES: Final = 4
"""Tables on their way where memory allows it: one is attended to, two are read, and one bridges a layer that is resident."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSizes:
    """A model's cache at a context length: `layers` of `heads` tables, `table_bytes` each, of which a bucket is the tail."""

    layers: int
    heads: int
    table_bytes: int
    bucket_bytes: int

    @property
    def layer_bytes(self) -> int:
        return self.heads * self.table_bytes

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.layers * self.layer_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShare:
    """What memory holds: all tables of some layers; of the others a tail each, and a ring.

    Attributes:
        streamed: the layers whose tables are on disk. ring_bytes: 0 where there are none.
        streamed_bytes: read for a token at the end of a full context. nbytes: memory.
    """

    streamed: frozenset[int]
    ring_bytes: int
    streamed_bytes: int
    nbytes: int


def share_cache(sizes: CacheSizes, nbytes: int | None) -> CacheShare:
    """The most layers that so many bytes hold, and the roomiest ring beside them; all layers with None.

    Raises:
        BudgetError: less than one table and the tails.
    """
    if nbytes is None or nbytes >= sizes.nbytes:
        return CacheShare(streamed=frozenset(), ring_bytes=0, streamed_bytes=0, nbytes=sizes.nbytes)
    for tables in range(RING_TABLES, 0, -1):
        for streamed in range(1, sizes.layers + 1):
            share = _share(sizes, streamed, min(tables, streamed * sizes.heads))
            if share.nbytes <= nbytes:
                return share
    least = least_cache(sizes)
    raise BudgetError(
        f"--kv-ram {format_size(nbytes)}: too little for this context; {format_size(least)} ({least} bytes) would do: "
        "raise --kv-ram or lower --ctx",
        budget_bytes=nbytes,
        minimum_bytes=least,
    )


def least_cache(sizes: CacheSizes) -> int:
    """Memory without which there is no attention: one table, and the tails of all."""
    return min(sizes.nbytes, _share(sizes, sizes.layers, 1).nbytes)


def _share(sizes: CacheSizes, count: int, tables: int) -> CacheShare:
    """With so many layers streamed, spread evenly, so that reading goes on beside those in between."""
    steps = [layer * count // sizes.layers for layer in range(sizes.layers + 1)]
    streamed = frozenset(layer for layer in range(sizes.layers) if steps[layer + 1] > steps[layer])
    ring = tables * sizes.table_bytes
    resident = (sizes.layers - count) * sizes.layer_bytes
    tails = count * sizes.heads * sizes.bucket_bytes
    return CacheShare(
        streamed=streamed, ring_bytes=ring, streamed_bytes=count * sizes.layer_bytes, nbytes=resident + tails + ring
    )
