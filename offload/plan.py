"""Where every block will live, how fast that will be, and what is the least that works. Pure arithmetic, no I/O.

    budget = base + margin + vectors + KV + workspace + ring + pinned        (host RAM)

Blocks that are not pinned are streamed from disk once per pass through the ring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from offload.blocks import BlockKey, BlockSpec, TierName
from offload.errors import BudgetError
from offload.prefetch.sequential import ring_capacity, streaming_order
from offload.units import format_size

DEFAULT_DISK_BPS: Final = 1.0e9
RING_SLACKS: Final = (1.0, 0.5, 0.25, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a model at a context length needs before any budget is known.

    Attributes:
        blocks: every matrix, in order of first use in a pass.
        stages: per stage, indices into `blocks`.
        embedding: the token table where no head part is the same bytes, else None. Rows can be read from disk.
        fixed: bytes that are always resident, by purpose: base, margin, vectors, kv, workspace.
        compute_s: kernel time of one decoded token.
        disk_bps: bandwidth of the disk in bytes/s.
    """

    blocks: tuple[BlockSpec, ...]
    stages: tuple[tuple[int, ...], ...]
    embedding: BlockSpec | None
    fixed: Mapping[str, int]
    compute_s: float
    disk_bps: float
    ctx: int
    prefill_tokens_per_pass: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One block and the tier that is its home."""

    key: BlockKey
    tier: TierName
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A placement and what follows from it. Byte counts are of host RAM unless they say otherwise."""

    budget_bytes: int
    minimum_bytes: int
    model_bytes: int
    pinned_bytes: int
    streamed_bytes: int
    ring_bytes: int
    kv_bytes: int
    workspace_bytes: int
    base_bytes: int
    margin_bytes: int
    embedding_bytes: int
    edges: Mapping[str, float]
    compute_s: float
    stream_s: float
    placements: tuple[Placement, ...]
    ctx: int
    prefill_tokens_per_pass: int
    demand: Demand = field(repr=False)

    @property
    def predicted_tps(self) -> float:
        """Decoded tokens per second: computing and reading overlap, so the longer of the two decides."""
        return 1 / max(self.compute_s, self.stream_s, 1e-9)

    @property
    def bound(self) -> Literal["disk", "compute"]:
        """What limits decoding."""
        return "disk" if self.stream_s > self.compute_s else "compute"

    @property
    def used_bytes(self) -> int:
        """Bytes of the budget that the plan gives out."""
        return (
            self.base_bytes + self.margin_bytes + self.kv_bytes + self.workspace_bytes
            + self.ring_bytes + self.pinned_bytes + self.embedding_bytes
        )  # fmt: skip

    @property
    def streamed(self) -> frozenset[BlockKey]:
        """Keys of the blocks that pass through the ring."""
        return frozenset(placement.key for placement in self.placements if placement.tier == "nvme")

    def with_budget(self, budget_bytes: int) -> Plan:
        """The plan for the same demand at another budget.

        Raises:
            BudgetError: below the minimum.
        """
        return make_plan(self.demand, budget_bytes)


def minimum_budget(demand: Demand) -> int:
    """The least number of bytes with which the model runs: everything streamed through the smallest ring.

    A model so small that the ring would be larger than itself is pinned instead.
    """
    everything = sum(block.footprint for block in demand.blocks)
    return sum(demand.fixed.values()) + min(everything, _ring(demand, set(range(len(demand.blocks))), 0.0))


def full_budget(demand: Demand) -> int:
    """The budget from which on nothing is streamed."""
    everything = sum(block.footprint for block in demand.blocks)
    return sum(demand.fixed.values()) + everything + (demand.embedding.footprint if demand.embedding else 0)


def make_plan(demand: Demand, budget_bytes: int) -> Plan:
    """Pins the largest share that fits and streams the rest.

    Raises:
        BudgetError: the budget is below `minimum_budget(demand)`.
    """
    minimum = minimum_budget(demand)
    available = budget_bytes - sum(demand.fixed.values())
    candidates = (_choose(demand, available, slack) for slack in RING_SLACKS)
    chosen = [choice for choice in candidates if choice is not None]
    if not chosen:
        raise BudgetError(
            f"--ram {format_size(budget_bytes)}: too little for this model at context {demand.ctx}; "
            f"it needs at least {format_size(minimum)} ({minimum} bytes): raise --ram or lower --ctx",
            budget_bytes=budget_bytes,
            minimum_bytes=minimum,
        )
    # a roomier ring hides latency, a smaller one pins more: take the roomiest that streams at most 2% more
    least = min(_nbytes(demand, streamed) for streamed, _ in chosen)
    streamed, ring = next(choice for choice in chosen if _nbytes(demand, choice[0]) <= 1.02 * least)
    return _plan(demand, budget_bytes, minimum, streamed, ring)


def _choose(demand: Demand, available: int, slack: float) -> tuple[set[int], int] | None:
    """The streamed blocks and the ring's bytes at this slack, or None when they do not fit."""
    pinned = sum(block.footprint for block in demand.blocks)
    if pinned <= available:
        return set(), 0
    streamed: set[int] = set()
    for index in streaming_order(demand.blocks):
        streamed.add(index)
        pinned -= demand.blocks[index].footprint
        if pinned > available:
            continue
        ring = _ring(demand, streamed, slack)
        if pinned + ring <= available:
            return streamed, ring
    return None


def _ring(demand: Demand, streamed: set[int], slack: float) -> int:
    needs = [[demand.blocks[i].footprint for i in stage if i in streamed] for stage in demand.stages]
    return ring_capacity(needs, slack)


def _nbytes(demand: Demand, streamed: set[int]) -> int:
    return sum(demand.blocks[i].footprint for i in streamed)


def _plan(demand: Demand, budget: int, minimum: int, streamed: set[int], ring: int) -> Plan:
    pinned = sum(block.footprint for i, block in enumerate(demand.blocks) if i not in streamed)
    moved = _nbytes(demand, streamed)
    left = budget - sum(demand.fixed.values()) - pinned - ring
    # a row of the token table costs one small read a token, so the table is the last thing worth its memory
    embedding = demand.embedding.footprint if demand.embedding and demand.embedding.footprint <= left else 0
    return Plan(
        budget_bytes=budget,
        minimum_bytes=minimum,
        model_bytes=sum(block.nbytes for block in demand.blocks) + (demand.embedding.nbytes if demand.embedding else 0),
        pinned_bytes=pinned,
        streamed_bytes=moved,
        ring_bytes=ring,
        kv_bytes=demand.fixed["kv"],
        workspace_bytes=demand.fixed["workspace"] + demand.fixed["vectors"],
        base_bytes=demand.fixed["base"],
        margin_bytes=demand.fixed["margin"],
        embedding_bytes=embedding,
        edges={"nvme->ram": demand.disk_bps},
        compute_s=demand.compute_s,
        stream_s=moved / demand.disk_bps,
        placements=_placements(demand.blocks, streamed),
        ctx=demand.ctx,
        prefill_tokens_per_pass=demand.prefill_tokens_per_pass,
        demand=demand,
    )


def _placements(blocks: Sequence[BlockSpec], streamed: set[int]) -> tuple[Placement, ...]:
    return tuple(
        Placement(key=block.key, tier="nvme" if i in streamed else "ram", nbytes=block.nbytes)
        for i, block in enumerate(blocks)
    )


def with_rates(demand: Demand, *, compute_s: float, disk_bps: float) -> Demand:
    """The same demand on a machine of other speeds."""
    return replace(demand, compute_s=compute_s, disk_bps=disk_bps)
