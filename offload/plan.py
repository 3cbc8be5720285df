"""Where every block will live, how fast that will be, and what is the least that works. Pure arithmetic, no I/O.

    budget = base + margin + vectors + KV + workspace + ring + pinned        (host RAM)

Blocks that are not pinned are streamed from disk once per pass through the ring. With a device there is one tier more, of
the same form: what is not pinned in VRAM passes through a ring there, and only that needs a place in RAM or on disk.

The KV cache is empty at first, and a prompt's workspace is idle while tokens are decoded: until they are used, such bytes
hold streamed blocks, on loan. The plan counts them where they belong; a loan makes tokens faster and takes no more memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from offload.bank_plan import beside, device_bytes, least_bytes, num_visiting, share_device, share_slots, visiting_bytes
from offload.blocks import BlockKey, BlockSpec, TierName
from offload.demand import Demand
from offload.errors import BudgetError
from offload.prefetch.sequential import block_limits, ring_capacity, streaming_order
from offload.processors import share_of_host
from offload.units import MIB, align_down, format_size

DEFAULT_DISK_BPS: Final = 1.0e9
OVERLAP_COST: Final = 0.15
"""What computing and reading take from each other while both run: memory bandwidth, and a core now and then. Measured on two
cores with a disk of 3.3 GB/s: kernels kept 0.82 to 0.86 of their speed, reads 0.83 to 0.95 of theirs."""
EXPERT_OVERLAP_COST: Final = 0.5
"""The same where experts are read: which ones is known late, so half of the shorter one is not overlapped. Measured with 94%
of guesses right, at a third and at two thirds of the experts in memory."""
LOAN_GRAIN: Final = 2 * MIB  # a huge page: less than one cannot be given back
RING_SLACKS: Final = (4.0, 2.0, 1.0, 0.5, 0.25, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One block and the tier that is its home."""

    key: BlockKey
    tier: TierName
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A placement and what follows from it. Byte counts are of host RAM unless they say otherwise.

    Attributes:
        minimum_bytes: a budget that is sure to do.
        pinned_bytes: weights that stay for good. streamed_bytes: the others, read once per pass when nothing is lent.
        borrowers: streamed blocks that may live in idle memory, in the order in which they get it.
        link_bytes: that cross to the device for a decoded token. shared_bytes: that the host computes instead, where they
            lie; `host_share` of each matrix in its memory.
        bank_slots: for each bank, how many experts it holds. bank_bytes: memory of all banks.
        device_slots: experts of a bank that the device holds. device_visiting: slots for others. device_bank_bytes: of both.
    """

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
    placements: tuple[Placement, ...]
    borrowers: tuple[BlockSpec, ...]
    bank_slots: tuple[int, ...] = ()
    bank_bytes: int = 0
    device_slots: tuple[int, ...] = ()
    device_visiting: int = 0
    device_bank_bytes: int = 0
    ctx: int
    trained_ctx: int
    prefill_tokens_per_pass: int
    device_budget_bytes: int | None = None
    device_pinned_bytes: int = 0
    device_ring_bytes: int = 0
    link_bytes: int = 0
    shared_bytes: int = 0
    host_share: float = 0.0
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
        stream_s, overlap_cost = self.stream_s_at(position), OVERLAP_COST
        if self.missed_bytes_at(position):
            compute_s += self.demand.fetch_s
            overlap_cost = EXPERT_OVERLAP_COST
        longer, shorter = max(compute_s, stream_s), min(compute_s, stream_s)
        return 1 / max(longer + overlap_cost * shorter, 1e-9)

    def on_loan(self, tokens: int, *, prompt: bool = False) -> int:
        """How many of `borrowers` fit into what is idle, see `Demand.idle`."""
        idle = align_down(self.demand.idle(tokens, prompt=prompt), LOAN_GRAIN)
        count = 0
        for block in self.borrowers:
            idle -= block.footprint
            if idle < 0:
                break
            count += 1
        return count

    def bank_slots_at(self, tokens: int, *, prompt: bool = False) -> tuple[int, ...]:
        """For each bank, how many experts it holds when idle memory is lent to it, see `Demand.idle`.

        Blocks that every token streams come first: where there are any, experts get nothing.
        """
        if self.borrowers or not self.bank_slots:
            return self.bank_slots
        grain = LOAN_GRAIN * len(self.bank_slots)  # each bank may keep a huge page that it shares with a slot that went
        idle = self.demand.idle(tokens, prompt=prompt) - grain
        slots = share_slots(self.demand.banks, self.bank_bytes + max(0, idle))
        return beside(self.demand.banks, tuple(map(max, self.bank_slots, slots)), self.device_slots)

    def streamed_bytes_at(self, position: int) -> int:
        """Bytes read from disk for one decoded token behind `position` others."""
        lent = sum(block.footprint for block in self.borrowers[: self.on_loan(position + 1)])
        return self.streamed_bytes - lent + self.missed_bytes_at(position)

    @property
    def expert_share(self) -> float:
        """Of all experts, what memory and the device hold; 1 where there are none."""
        every = sum(bank.num_experts for bank in self.demand.banks)
        held = sum(self.bank_slots) + sum(self.device_slots)
        return min(1.0, held / every) if every else 1.0

    @property
    def bank_bytes_held(self) -> int:
        """Bytes of the experts that memory holds: of `bank_bytes`, what is weights."""
        return sum(slots * bank.expert_bytes for bank, slots in zip(self.demand.banks, self.bank_slots, strict=True))

    @property
    def bank_bytes_on_disk(self) -> int:
        """Bytes of the experts that memory does not hold."""
        every = sum(bank.num_experts * bank.expert_bytes for bank in self.demand.banks)
        return max(0, every - self.bank_bytes_held - self.device_bank_bytes_held)

    @property
    def device_bank_bytes_held(self) -> int:
        """Bytes of the experts that the device holds: of `device_bank_bytes`, what is weights."""
        return sum(slots * bank.expert_bytes for bank, slots in zip(self.demand.banks, self.device_slots, strict=False))

    @property
    def missed_bytes(self) -> int:
        """`missed_bytes_at` the start of the context."""
        return self.missed_bytes_at(0)

    def missed_bytes_at(self, position: int) -> int:
        """Bytes of experts read for such a token: as in the trace, or as if all were chosen equally often."""
        slots = self.bank_slots_at(position + 1)
        held = self.device_slots or (0,) * len(slots)
        return sum(
            bank.missed_bytes(min(bank.num_experts, here + there))
            for bank, here, there in zip(self.demand.banks, slots, held, strict=True)
        )

    @property
    def lends(self) -> bool:
        """Whether anything borrows what is idle."""
        return self.on_loan(0) > 0 or self.bank_slots_at(0) != self.bank_slots

    def stream_s_at(self, position: int) -> float:
        """Seconds that moving the weights of such a token takes, over the slowest edge."""
        link_s = self.link_bytes / self.demand.link_bps if self.link_bytes else 0.0
        host_s = self.shared_bytes / self.demand.dense_bps if self.shared_bytes else 0.0
        return max(self.streamed_bytes_at(position) / self.demand.disk_bps, link_s, host_s)

    @property
    def stream_s(self) -> float:
        """`stream_s_at` the start of the context."""
        return self.stream_s_at(0)

    @property
    def bound(self) -> Literal["disk", "link", "compute"]:
        """What limits decoding."""
        if self.compute_s >= self.stream_s:
            return "compute"
        return "disk" if self.streamed_bytes_at(0) / self.demand.disk_bps >= self.stream_s else "link"

    @property
    def used_bytes(self) -> int:
        """Bytes of the budget that the plan gives out."""
        return (
            self.base_bytes + self.margin_bytes + self.kv_bytes + self.workspace_bytes
            + self.ring_bytes + self.pinned_bytes + self.embedding_bytes + self.bank_bytes
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
    streamed = min(everything, _ring(demand, set(range(len(demand.blocks))), 0.0))
    return sum(demand.fixed.values()) + streamed + least_bytes(demand.banks)


def minimum_device_budget(demand: Demand) -> int:
    """The least number of bytes on the device with which the model runs: everything passes through the smallest ring."""
    assert demand.device_fixed is not None
    ring = _ring(demand, range(len(demand.blocks)), 0.0)
    return sum(demand.device_fixed.values()) + visiting_bytes(demand.banks, 1) + ring


def full_budget(demand: Demand) -> int:
    """The budget from which on nothing is streamed."""
    everything = sum(block.footprint for block in demand.blocks)
    everything += sum(bank.slot_bytes * bank.num_experts for bank in demand.banks)
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
    below = _host(demand, budget_bytes, frozenset(on_device.streamed))
    return _plan(demand, budget_bytes, below, on_device, device_budget_bytes)


class _Share(NamedTuple):
    """One tier's part: its pinned blocks, those that pass through its ring, first chosen first, and the ring's bytes."""

    pinned: frozenset[int]
    streamed: tuple[int, ...]
    ring: int


def _host(demand: Demand, budget: int, members: frozenset[int]) -> _Share:
    share = _best(demand, budget - sum(demand.fixed.values()) - least_bytes(demand.banks), members)
    if share is not None:
        return share
    minimum = minimum_budget(demand)
    raise BudgetError(
        f"--ram {format_size(budget)}: too little for this model at context {demand.ctx}; "
        f"{format_size(minimum)} ({minimum} bytes) would do: raise --ram or lower --ctx",
        budget_bytes=budget,
        minimum_bytes=minimum,
    )


def _device(demand: Demand, budget: int) -> _Share:
    assert demand.device_fixed is not None
    fixed = sum(demand.device_fixed.values()) + visiting_bytes(demand.banks, 1)
    share = _best(demand, budget - fixed, frozenset(range(len(demand.blocks))))
    if share is not None:
        return share
    minimum = minimum_device_budget(demand)
    raise BudgetError(
        f"--vram {format_size(budget)}: too little for this model at context {demand.ctx}; "
        f"{format_size(minimum)} ({minimum} bytes) would do: raise --vram or lower --ctx",
        budget_bytes=budget,
        minimum_bytes=minimum,
    )


def _best(demand: Demand, available: int, members: frozenset[int]) -> _Share | None:
    """The roomiest ring that streams at most 5% more than the least, in the mean of an empty and a full context.

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
    idle = demand.idle(0, prompt=False)
    full = [_nbytes(demand, share.streamed) for share in shares]
    moved = [nbytes + max(0, nbytes - idle) for nbytes in full]
    return next(share for share, nbytes in zip(shares, moved, strict=True) if nbytes <= 1.05 * min(moved))


def _choose(
    demand: Demand, available: int, slack: float, members: frozenset[int], order: Sequence[int]
) -> _Share | None:
    """Streams as few of `members`, in this order, as the slack allows, or None when they do not fit."""
    pinned = _nbytes(demand, members)
    if pinned <= available:
        return _Share(members, (), 0)
    streamed: list[int] = []
    for index in order:
        if index not in members:
            continue
        streamed.append(index)
        pinned -= demand.blocks[index].footprint
        if pinned > available:
            continue
        ring = _ring(demand, streamed, slack)
        if pinned + ring <= available:
            return _Share(members.difference(streamed), tuple(streamed), ring)
    return None


def _ring(demand: Demand, streamed: Collection[int], slack: float) -> int:
    members = frozenset(streamed)
    needs = [[demand.blocks[i].footprint for i in group if i in members] for group in demand.groups]
    return ring_capacity(needs, slack)


def _nbytes(demand: Demand, indices: Iterable[int]) -> int:
    return sum(demand.blocks[i].footprint for i in indices)


def _plan(
    demand: Demand, budget: int, host: _Share, device: _Share | None = None, device_budget: int | None = None
) -> Plan:
    pinned, moved = _nbytes(demand, host.pinned), _nbytes(demand, host.streamed)
    crossing = frozenset(device.streamed if device is not None else ())
    host_share = share_of_host(demand.link_bps, demand.dense_bps) if demand.shared else 0.0
    shared = int(host_share * _nbytes(demand, (crossing & demand.shared).difference(host.streamed)))
    left = budget - sum(demand.fixed.values()) - pinned - host.ring
    device_slots: tuple[int, ...] = ()
    visiting = 0
    if device is not None and device_budget is not None and demand.device_fixed is not None:
        used = sum(demand.device_fixed.values()) + _nbytes(demand, device.pinned) + device.ring
        device_slots = share_device(demand.banks, device_budget - used)
        visiting = num_visiting(demand.banks, device_budget - used, device_slots)
    bank_slots = beside(demand.banks, share_slots(demand.banks, left), device_slots)
    bank_bytes = sum(bank.slot_bytes * slots for bank, slots in zip(demand.banks, bank_slots, strict=True))
    # a row of the token table costs one small read a token, so the table is the last thing worth its memory
    table = demand.embedding
    return Plan(
        budget_bytes=budget,
        minimum_bytes=minimum_budget(demand),
        model_bytes=sum(block.nbytes for block in demand.blocks)
        + sum(bank.expert_bytes * bank.num_experts for bank in demand.banks)
        + (table.nbytes if table else 0),
        pinned_bytes=pinned,
        streamed_bytes=moved,
        ring_bytes=host.ring,
        kv_bytes=demand.fixed["kv"],
        workspace_bytes=demand.fixed["workspace"] + demand.fixed["vectors"],
        base_bytes=demand.fixed["base"],
        margin_bytes=demand.fixed["margin"],
        embedding_bytes=table.footprint if table and table.footprint <= left - bank_bytes else 0,
        edges={"nvme->ram": demand.disk_bps} | ({"ram->vram": demand.link_bps} if device is not None else {}),
        compute_s=demand.compute_s,
        placements=_placements(demand.blocks, host, device),
        borrowers=tuple(demand.blocks[i] for i in reversed(host.streamed)),
        bank_slots=bank_slots,
        bank_bytes=bank_bytes,
        device_slots=device_slots,
        device_visiting=visiting,
        device_bank_bytes=device_bytes(demand.banks, device_slots, visiting),
        ctx=demand.ctx,
        trained_ctx=demand.trained_ctx,
        prefill_tokens_per_pass=demand.prefill_tokens_per_pass,
        device_budget_bytes=device_budget,
        device_pinned_bytes=_nbytes(demand, device.pinned) if device is not None else 0,
        device_ring_bytes=device.ring if device is not None else 0,
        link_bytes=_nbytes(demand, crossing) - shared,
        shared_bytes=shared,
        host_share=host_share,
        demand=demand,
    )


def _placements(blocks: Sequence[BlockSpec], host: _Share, device: _Share | None) -> tuple[Placement, ...]:
    streamed = frozenset(host.streamed)

    def tier(index: int) -> TierName:
        if device is not None and index in device.pinned:
            return "vram"
        return "nvme" if index in streamed else "ram"

    return tuple(Placement(key=block.key, tier=tier(i), nbytes=block.nbytes) for i, block in enumerate(blocks))
