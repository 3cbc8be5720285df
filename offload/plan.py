"""Where every block will live, how fast that will be, and what is the least that works. Pure arithmetic, no I/O.

    budget = base + margin + vectors + KV + workspace + ring + pinned        (host RAM)

Blocks that are not pinned are streamed from disk once per pass through the ring. With a device there is one tier more, of
the same form: what is not pinned in VRAM passes through a ring there, and only that needs a place in RAM or on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from offload.blocks import BlockKey, BlockSpec, TierName
from offload.errors import BudgetError
from offload.prefetch.sequential import block_limits, ring_capacity, streaming_order
from offload.units import format_size

DEFAULT_DISK_BPS: Final = 1.0e9
OVERLAP_COST: Final = 0.15
"""What computing and reading take from each other while both run: memory bandwidth, and a core now and then. Measured on two
cores with a disk of 3.3 GB/s: kernels kept 0.82 to 0.86 of their speed, reads 0.83 to 0.95 of theirs."""
RING_SLACKS: Final = (1.0, 0.5, 0.25, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a model at a context length needs before any budget is known.

    Attributes:
        blocks: every matrix, in order of first use in a pass.
        stages: per stage, indices into `blocks`.
        embedding: the token table where no head part is the same bytes, else None. Rows can be read from disk.
        fixed: bytes that are always resident, by purpose: base, margin, vectors, kv, workspace.
        compute_s: kernel time of one decoded token at the start of the context.
        attention_s: what attention adds to it at the end of a full context.
        disk_bps: bandwidth of the disk in bytes/s. link_bps: of the way from RAM to the device.
        device_fixed: bytes that are always on the device, by purpose; None when computing happens in host RAM.
    """

    blocks: tuple[BlockSpec, ...]
    stages: tuple[tuple[int, ...], ...]
    embedding: BlockSpec | None
    fixed: Mapping[str, int]
    compute_s: float
    attention_s: float = 0.0
    disk_bps: float
    ctx: int
    prefill_tokens_per_pass: int
    link_bps: float = 0.0
    device_fixed: Mapping[str, int] | None = None


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
    device_budget_bytes: int | None = None
    device_pinned_bytes: int = 0
    device_ring_bytes: int = 0
    link_bytes: int = 0
    demand: Demand = field(repr=False)

    @property
    def predicted_tps(self) -> float:
        """Decoded tokens per second at the start of the context."""
        return self.predicted_tps_at(0)

    def predicted_tps_at(self, position: int) -> float:
        """Decoded tokens per second behind `position` tokens.

        Computing and reading overlap, so the longer of the two decides, and the shorter slows it a little; attention's
        share of computing grows with the position (a sliding window's, which stops growing, counts as if it grew evenly).
        """
        compute_s = self.compute_s + self.demand.attention_s * min(1.0, position / self.ctx)
        longer, shorter = max(compute_s, self.stream_s), min(compute_s, self.stream_s)
        return 1 / max(longer + OVERLAP_COST * shorter, 1e-9)

    @property
    def bound(self) -> Literal["disk", "link", "compute"]:
        """What limits decoding."""
        if self.compute_s >= self.stream_s:
            return "compute"
        return "disk" if self.streamed_bytes / self.demand.disk_bps >= self.stream_s else "link"

    @property
    def used_bytes(self) -> int:
        """Bytes of the budget that the plan gives out."""
        return (
            self.base_bytes + self.margin_bytes + self.kv_bytes + self.workspace_bytes
            + self.ring_bytes + self.pinned_bytes + self.embedding_bytes
        )  # fmt: skip

    @property
    def streamed(self) -> frozenset[BlockKey]:
        """Keys of the blocks that a pass has to wait for: all that are not pinned where computing happens."""
        home = "ram" if self.device_budget_bytes is None else "vram"
        return frozenset(placement.key for placement in self.placements if placement.tier != home)

    @property
    def from_disk(self) -> frozenset[BlockKey]:
        """Keys of the blocks that are read from disk in every pass."""
        return frozenset(placement.key for placement in self.placements if placement.tier == "nvme")

    def with_budget(self, budget_bytes: int) -> Plan:
        """The plan for the same demand at another budget.

        Raises:
            BudgetError: below the minimum.
        """
        return make_plan(self.demand, budget_bytes, self.device_budget_bytes)


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


def make_plan(demand: Demand, budget_bytes: int, device_budget_bytes: int | None = None) -> Plan:
    """Pins the largest share that fits and streams the rest.

    Args:
        device_budget_bytes: bytes on the device, when `demand.device_fixed` says that computing happens there.

    Raises:
        BudgetError: a budget is below what the model needs.
    """
    everything = frozenset(range(len(demand.blocks)))
    if demand.device_fixed is None:
        return _plan(demand, budget_bytes, _host(demand, budget_bytes, everything))
    assert device_budget_bytes is not None, "a demand on a device needs a device budget"
    on_device = _device(demand, device_budget_bytes)
    below = _host(demand, budget_bytes, on_device.streamed)
    return _plan(demand, budget_bytes, below, on_device, device_budget_bytes)


class _Share(NamedTuple):
    """One tier's part: which of its blocks are pinned, which pass through its ring, and the ring's bytes."""

    pinned: frozenset[int]
    streamed: frozenset[int]
    ring: int


def _host(demand: Demand, budget: int, members: frozenset[int]) -> _Share:
    share = _best(demand, budget - sum(demand.fixed.values()), members)
    if share is not None:
        return share
    minimum = minimum_budget(demand)
    raise BudgetError(
        f"--ram {format_size(budget)}: too little for this model at context {demand.ctx}; "
        f"it needs at least {format_size(minimum)} ({minimum} bytes): raise --ram or lower --ctx",
        budget_bytes=budget,
        minimum_bytes=minimum,
    )


def _device(demand: Demand, budget: int) -> _Share:
    assert demand.device_fixed is not None
    fixed, everything = sum(demand.device_fixed.values()), frozenset(range(len(demand.blocks)))
    share = _best(demand, budget - fixed, everything)
    if share is not None:
        return share
    minimum = fixed + _ring(demand, everything, 0.0)
    raise BudgetError(
        f"--vram {format_size(budget)}: too little for this model at context {demand.ctx}; "
        f"it needs at least {format_size(minimum)} ({minimum} bytes): raise --vram or lower --ctx",
        budget_bytes=budget,
        minimum_bytes=minimum,
    )


def _best(demand: Demand, available: int, members: frozenset[int]) -> _Share | None:
    """The roomiest ring that streams at most 5% more than the least.

    A roomier ring hides latency, a smaller one pins more; so does one that only small blocks pass through.
    """
    orders = [streaming_order(demand.blocks, limit) for limit in reversed(block_limits(demand.blocks))]
    shares = [
        share
        for slack in RING_SLACKS
        for order in orders
        if (share := _choose(demand, available, slack, members, order)) is not None
    ]
    if not shares:
        return None
    least = min(_nbytes(demand, share.streamed) for share in shares)
    return next(share for share in shares if _nbytes(demand, share.streamed) <= 1.05 * least)


def _choose(
    demand: Demand, available: int, slack: float, members: frozenset[int], order: Sequence[int]
) -> _Share | None:
    """Streams as few of `members`, in this order, as the slack allows, or None when they do not fit."""
    pinned = _nbytes(demand, members)
    if pinned <= available:
        return _Share(members, frozenset(), 0)
    streamed: set[int] = set()
    for index in order:
        if index not in members:
            continue
        streamed.add(index)
        pinned -= demand.blocks[index].footprint
        if pinned > available:
            continue
        ring = _ring(demand, streamed, slack)
        if pinned + ring <= available:
            return _Share(members - streamed, frozenset(streamed), ring)
    return None


def _ring(demand: Demand, streamed: AbstractSet[int], slack: float) -> int:
    needs = [[demand.blocks[i].footprint for i in stage if i in streamed] for stage in demand.stages]
    return ring_capacity(needs, slack)


def _nbytes(demand: Demand, streamed: AbstractSet[int]) -> int:
    return sum(demand.blocks[i].footprint for i in streamed)


def _plan(
    demand: Demand, budget: int, host: _Share, device: _Share | None = None, device_budget: int | None = None
) -> Plan:
    pinned, moved = _nbytes(demand, host.pinned), _nbytes(demand, host.streamed)
    link = _nbytes(demand, device.streamed) if device is not None else 0
    left = budget - sum(demand.fixed.values()) - pinned - host.ring
    # a row of the token table costs one small read a token, so the table is the last thing worth its memory
    table = demand.embedding
    edges = {"nvme->ram": demand.disk_bps} | ({"ram->vram": demand.link_bps} if device is not None else {})
    return Plan(
        budget_bytes=budget,
        minimum_bytes=minimum_budget(demand),
        model_bytes=sum(block.nbytes for block in demand.blocks) + (table.nbytes if table else 0),
        pinned_bytes=pinned,
        streamed_bytes=moved,
        ring_bytes=host.ring,
        kv_bytes=demand.fixed["kv"],
        workspace_bytes=demand.fixed["workspace"] + demand.fixed["vectors"],
        base_bytes=demand.fixed["base"],
        margin_bytes=demand.fixed["margin"],
        embedding_bytes=table.footprint if table and table.footprint <= left else 0,
        edges=edges,
        compute_s=demand.compute_s,
        stream_s=max(moved / demand.disk_bps, link / demand.link_bps if link else 0.0),
        placements=_placements(demand.blocks, host, device),
        ctx=demand.ctx,
        prefill_tokens_per_pass=demand.prefill_tokens_per_pass,
        device_budget_bytes=device_budget,
        device_pinned_bytes=_nbytes(demand, device.pinned) if device is not None else 0,
        device_ring_bytes=device.ring if device is not None else 0,
        link_bytes=link,
        demand=demand,
    )


def _placements(blocks: Sequence[BlockSpec], host: _Share, device: _Share | None) -> tuple[Placement, ...]:
    def tier(index: int) -> TierName:
        if device is not None and index in device.pinned:
            return "vram"
        return "nvme" if index in host.streamed else "ram"

    return tuple(Placement(key=block.key, tier=tier(i), nbytes=block.nbytes) for i, block in enumerate(blocks))
