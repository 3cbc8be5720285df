"""Where every block will live, how fast that will be, and what is the least that works. Pure arithmetic, no I/O.

    budget = base + margin + vectors + KV + workspace + ring + pinned        (host RAM)

Blocks that are not pinned are streamed from disk once per pass through the ring. With a device there is one tier more, of
the same form: what is not pinned in VRAM passes through a ring there, and only that needs a place in RAM or on disk.

The KV cache is empty at first, and a prompt's workspace is idle while tokens are decoded: until they are used, such bytes
hold streamed blocks, on loan. The plan counts them where they belong; a loan makes tokens faster and takes no more memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final, Literal

from offload.bank_plan import beside, device_bytes, least_bytes, share_device, share_slots
from offload.blocks import BlockKey, BlockSpec, TierName
from offload.demand import Demand
from offload.errors import BudgetError
from offload.shares import NOTHING, Share, leanest, nbytes, ring_bytes, roomiest
from offload.units import MIB, align_down, format_size

DEFAULT_DISK_BPS: Final = 1.0e9
OVERLAP_COST: Final = 0.15
"""What computing and reading take from each other while both run: memory bandwidth, and a core now and then. Measured on two
cores with a disk of 3.3 GB/s: kernels kept 0.82 to 0.86 of their speed, reads 0.83 to 0.95 of theirs."""
EXPERT_OVERLAP_COST: Final = 0.5
"""The same where experts are read: which ones is known late, so half of the shorter one is not overlapped. Measured with 94%
of guesses right, at a third and at two thirds of the experts in memory."""
LOAN_GRAIN: Final = 2 * MIB  # a huge page: less than one cannot be given back


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
        bank_slots: for each bank, how many experts it holds. bank_bytes: memory of all banks.
        device_slots: for each bank, how many experts the device holds for good. device_bank_bytes: memory of these.
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
    device_bank_bytes: int = 0
    ctx: int
    trained_ctx: int
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
        return moving_s(self.demand, self.link_bytes, self.streamed_bytes_at(position))

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
    streamed = min(everything, ring_bytes(demand, range(len(demand.blocks)), 0.0))
    return sum(demand.fixed.values()) + streamed + least_bytes(demand.banks)


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
    if demand.device_fixed is None:
        return _plan(demand, budget_bytes, _host(demand, budget_bytes))
    assert device_budget_bytes is not None, "a demand on a device needs a device budget"
    on_device, below = _both(demand, budget_bytes, device_budget_bytes)
    return _plan(demand, budget_bytes, below, on_device, device_budget_bytes)


def _host(demand: Demand, budget: int) -> Share:
    """The roomiest ring that streams at most 5% more than the least, in the mean of an empty and a full context."""
    shares = roomiest(demand, _host_bytes(demand, budget), frozenset(range(len(demand.blocks))))
    if not shares:
        raise _too_little(demand, "--ram", budget, minimum_budget(demand))
    idle = demand.idle(0, prompt=False)
    full = [nbytes(demand, share.streamed) for share in shares]
    moved = [count + max(0, count - idle) for count in full]
    return next(share for share, count in zip(shares, moved, strict=True) if count <= 1.05 * min(moved))


def _both(demand: Demand, budget: int, device_budget: int) -> tuple[Share, Share]:
    """What the device and the host keep: the roomiest rings with which moving takes at most 5% longer than the least that
    was found. The two are weighed together: where nearly all is in VRAM or RAM, a little more room for the device's ring is
    a multiple of what the disk has to read.
    """
    assert demand.device_fixed is not None
    fixed, everything = sum(demand.device_fixed.values()), frozenset(range(len(demand.blocks)))
    available = _host_bytes(demand, budget)
    lean = leanest(demand, device_budget - fixed, everything)
    if not lean:
        raise _too_little(demand, "--vram", device_budget, fixed + ring_bytes(demand, everything, 0.0))

    def seconds(device: Share, host: Share) -> float:
        return moving_s(demand, nbytes(demand, device.streamed), nbytes(demand, host.streamed))

    def least_s(device: Share) -> float:
        below = leanest(demand, available, frozenset(device.streamed))
        return min((seconds(device, host) for host in below), default=inf)

    bound = 1.05 * min(map(least_s, lean))
    if bound == inf:
        raise _too_little(demand, "--ram", budget, minimum_budget(demand))
    devices = [*roomiest(demand, device_budget - fixed, everything), *lean]
    device = next(share for share in devices if seconds(share, NOTHING) <= bound and least_s(share) <= bound)
    members = frozenset(device.streamed)
    hosts = [*roomiest(demand, available, members), *leanest(demand, available, members)]
    most = 1.05 * min(nbytes(demand, host.streamed) for host in hosts)
    return device, next(
        host for host in hosts if seconds(device, host) <= bound and nbytes(demand, host.streamed) <= most
    )


def moving_s(demand: Demand, link_bytes: int, disk_bytes: int) -> float:
    """Seconds over the slowest edge."""
    return max(disk_bytes / demand.disk_bps, link_bytes / demand.link_bps if link_bytes else 0.0)


def _host_bytes(demand: Demand, budget: int) -> int:
    return budget - sum(demand.fixed.values()) - least_bytes(demand.banks)


def _too_little(demand: Demand, option: str, budget: int, minimum: int) -> BudgetError:
    return BudgetError(
        f"{option} {format_size(budget)}: too little for this model at context {demand.ctx}; "
        f"{format_size(minimum)} ({minimum} bytes) would do: raise {option} or lower --ctx",
        budget_bytes=budget,
        minimum_bytes=minimum,
    )


def _plan(
    demand: Demand, budget: int, host: Share, device: Share | None = None, device_budget: int | None = None
) -> Plan:
    pinned, moved = nbytes(demand, host.pinned), nbytes(demand, host.streamed)
    link = nbytes(demand, device.streamed) if device is not None else 0
    left = budget - sum(demand.fixed.values()) - pinned - host.ring
    device_slots: tuple[int, ...] = ()
    if device is not None and device_budget is not None and demand.device_fixed is not None:
        used = sum(demand.device_fixed.values()) + nbytes(demand, device.pinned) + device.ring
        device_slots = share_device(demand.banks, device_budget - used)
    bank_slots = beside(demand.banks, share_slots(demand.banks, left), device_slots)
    bank_bytes = sum(bank.slot_bytes * slots for bank, slots in zip(demand.banks, bank_slots, strict=True))
    left -= bank_bytes
    # a row of the token table costs one small read a token, so the table is the last thing worth its memory
    table = demand.embedding
    edges = {"nvme->ram": demand.disk_bps} | ({"ram->vram": demand.link_bps} if device is not None else {})
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
        embedding_bytes=table.footprint if table and table.footprint <= left else 0,
        edges=edges,
        compute_s=demand.compute_s,
        placements=_placements(demand.blocks, host, device),
        borrowers=tuple(demand.blocks[i] for i in reversed(host.streamed)),
        bank_slots=bank_slots,
        bank_bytes=bank_bytes,
        device_slots=device_slots,
        device_bank_bytes=device_bytes(demand.banks, device_slots),
        ctx=demand.ctx,
        trained_ctx=demand.trained_ctx,
        prefill_tokens_per_pass=demand.prefill_tokens_per_pass,
        device_budget_bytes=device_budget,
        device_pinned_bytes=nbytes(demand, device.pinned) if device is not None else 0,
        device_ring_bytes=device.ring if device is not None else 0,
        link_bytes=link,
        demand=demand,
    )


def _placements(blocks: Sequence[BlockSpec], host: Share, device: Share | None) -> tuple[Placement, ...]:
    streamed = frozenset(host.streamed)

    def tier(index: int) -> TierName:
        if device is not None and index in device.pinned:
            return "vram"
        return "nvme" if index in streamed else "ram"

    return tuple(Placement(key=block.key, tier=tier(i), nbytes=block.nbytes) for i, block in enumerate(blocks))
