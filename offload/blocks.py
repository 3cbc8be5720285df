"""The unit of movement: a block, its name, and where its bytes lie on disk.

A block is whatever is moved or kept as one: a weight matrix, an expert, a KV page, an optimizer shard. This module knows
names and sizes; it holds no memory and reads no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from offload.units import PAGE, align_down, align_up

BlockKind = Literal["weight", "expert", "kv", "optimizer"]
TierName = Literal["vram", "ram", "nvme"]


class BlockKey(NamedTuple):
    """Name of a block. `layer` is -1 for what belongs to no layer; `part` counts parts, experts or pages."""

    kind: BlockKind
    layer: int
    name: str
    part: int = 0

    def __str__(self) -> str:
        suffix = f"[{self.part}]" if self.part else ""
        return f"{self.kind}:{self.name}{suffix}"


class ExpertKey(NamedTuple):
    """Number `expert` of layer `layer`."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"blk.{self.layer}.expert.{self.expert}"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A run of bytes in a file: `[offset, offset + nbytes)`. What follows from them is computed once: the hot loop asks."""

    path: Path
    offset: int
    nbytes: int

    @cached_property
    def end(self) -> int:
        return self.offset + self.nbytes

    @cached_property
    def window_offset(self) -> int:
        """Start of the smallest page-aligned window around the extent, the range that direct I/O reads."""
        return align_down(self.offset, PAGE)

    @cached_property
    def window_nbytes(self) -> int:
        return align_up(self.end, PAGE) - self.window_offset

    @cached_property
    def lead(self) -> int:
        """Bytes of the window that precede the extent."""
        return self.offset - self.window_offset


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """A block's size and home. `extent` is None for blocks that are born in memory (KV pages, gradients).

    `columns` are the elements of a row, 0 for what has none.
    """

    key: BlockKey
    nbytes: int
    extent: Extent | None = None
    columns: int = 0

    @cached_property
    def footprint(self) -> int:
        """Bytes that the block occupies in a tier that direct I/O fills: its aligned window."""
        return align_up(self.nbytes) if self.extent is None else self.extent.window_nbytes
