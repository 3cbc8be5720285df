"""Makes plans: which share of a model VRAM and RAM keep, and what is the least that works. Pure arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from offload.bank_plan import beside, device_bytes, least_bytes, num_visiting, share_device, share_slots, visiting_bytes
from offload.blocks import BlockSpec, TierName
from offload.demand import Demand
from offload.errors import BudgetError
from offload.plan import Placement, Plan, moving_s, overlapped_s
from offload.processors import share_of_host
from offload.shares import NOTHING, Share, leanest, nbytes, ring_bytes, roomiest
from offload.units import format_size


def minimum_budget(demand: Demand, device_budget_bytes: int | None = None) -> int:
    """The least number of bytes with which the model runs: everything streamed through the smallest ring.

    A model so small that the ring would be larger than itself is pinned instead. The KV cache is on the device, but for
    the layers that such a device has no room for.
    """
    if device_budget_bytes is None or demand.kv is None:
        return _least(demand)
    choices = kv_choices(demand)
    return _least(next((choice for choice in choices if _admits(choice, device_budget_bytes)), choices[-1]))


def _least(demand: Demand) -> int:
    everything = sum(block.footprint for block in demand.blocks)
    streamed = min(everything, ring_bytes(demand, range(len(demand.blocks)), 0.0))
    return sum(demand.fixed.values()) + streamed + least_bytes(demand.banks)


def minimum_device_budget(demand: Demand, budget_bytes: int | None = None) -> int:
    """The least number of bytes on the device with which the model runs: everything passes through the smallest ring, and
    the KV cache is in host memory, so far as this budget of RAM can hold it.
    """
    first, *others = kv_choices(demand)
    able = [choice for choice in others if budget_bytes is None or _least(choice) <= budget_bytes]
    return min(map(_device_least, (first, *able)))


def _device_least(demand: Demand) -> int:
    return _device_fixed(demand) + ring_bytes(demand, range(len(demand.blocks)), 0.0)


def _admits(demand: Demand, device_budget: int) -> bool:
    """Whether a device of such a budget can hold what has to be there."""
    everything = frozenset(range(len(demand.blocks)))
    return _device_least(demand) <= device_budget or bool(
        leanest(demand, device_budget - _device_fixed(demand), everything)
    )


def kv_choices(demand: Demand) -> list[Demand]:
    """The demand with keys and values of no layer, of one, .. and of all of them in host memory."""
    if demand.kv is None:
        return [demand]
    order = demand.kv.order
    return [demand.with_host_kv(frozenset(order[:count])) for count in range(len(order) + 1)]


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
    plan = _fastest(kv_choices(demand), budget_bytes, device_budget_bytes)
    if plan is not None:
        return plan
    if any(_admits(choice, device_budget_bytes) for choice in kv_choices(demand)):
        raise _too_little(demand, "--ram", budget_bytes, minimum_budget(demand, device_budget_bytes))
    raise _too_little(demand, "--vram", device_budget_bytes, minimum_device_budget(demand, budget_bytes))


def _fastest(choices: Sequence[Demand], budget: int, device_budget: int) -> Plan | None:
    """Of the plans for all choices the one with the least seconds per token at the end of a full context; of equals, the
    one with the fewest layers in host memory. None where no choice fits.

    Where everything fits on the device, it is there. What cannot be better than the best so far is not planned.
    """
    best = _on_device(choices[0], budget, device_budget)
    if best is not None and _keeps_everything(best):
        return best
    best_s = inf if best is None else best.seconds_at(best.ctx)
    others = sorted((_least_s(choice, device_budget), number) for number, choice in enumerate(choices[1:], 1))
    for least_s, number in others:
        if least_s > best_s * (1 + 1e-9):
            break
        plan = _on_device(choices[number], budget, device_budget)
        if plan is not None:
            seconds = plan.seconds_at(plan.ctx)
            if best is None or (seconds, number) < (best_s, len(best.host_kv)):
                best, best_s = plan, seconds
    return best


def _on_device(demand: Demand, budget: int, device_budget: int) -> Plan | None:
    shares = _both(demand, budget, device_budget)
    return None if shares is None else _plan(demand, budget, shares[1], shares[0], device_budget)


def _keeps_everything(plan: Plan) -> bool:
    return not plan.link_bytes and sum(plan.device_slots) == sum(bank.num_experts for bank in plan.demand.banks)


def _least_s(demand: Demand, device_budget: int) -> float:
    """Seconds per token that no plan can be below: at least the weights that the device has no room for cross the link."""
    beyond = nbytes(demand, range(len(demand.blocks))) - max(0, device_budget - _device_fixed(demand))
    link_s = (1 - _host_share(demand)) * max(0, beyond) / demand.link_bps if demand.link_bps else 0.0
    return overlapped_s(demand.compute_s + demand.crossing_s + demand.attention_s, link_s)


def with_budget(plan: Plan, budget_bytes: int) -> Plan:
    """The plan for the same demand at another budget of RAM.

    Raises:
        BudgetError: below the minimum.
    """
    return make_plan(plan.demand, budget_bytes, plan.device_budget_bytes)


def _host(demand: Demand, budget: int) -> Share:
    """The roomiest ring that streams at most 5% more than the least, in the mean of an empty and a full context."""
    shares = roomiest(demand, _host_bytes(demand, budget), frozenset(range(len(demand.blocks))))
    if not shares:
        raise _too_little(demand, "--ram", budget, minimum_budget(demand))
    idle = demand.idle(0, prompt=False)
    full = [nbytes(demand, share.streamed) for share in shares]
    moved = [count + max(0, count - idle) for count in full]
    return next(share for share, count in zip(shares, moved, strict=True) if count <= 1.05 * min(moved))


def _both(demand: Demand, budget: int, device_budget: int) -> tuple[Share, Share] | None:
    """What the device and the host keep: the roomiest rings with which moving takes at most 5% longer than the least that
    was found; None where a budget is too small. The two are weighed together: where nearly all is in VRAM or RAM, a little
    more room for the device's ring is a multiple of what the disk has to read.
    """
    fixed, everything = _device_fixed(demand), frozenset(range(len(demand.blocks)))
    available = _host_bytes(demand, budget)
    lean = leanest(demand, device_budget - fixed, everything)
    if not lean:
        return None

    crossing = 1 - _host_share(demand)  # of what is in host memory, about: the host computes the rest where it lies

    def seconds(device: Share, host: Share) -> float:
        return moving_s(demand, crossing * nbytes(demand, device.streamed), nbytes(demand, host.streamed))

    def least_s(device: Share) -> float:
        below = leanest(demand, available, frozenset(device.streamed))
        return min((seconds(device, host) for host in below), default=inf)

    bound = 1.05 * min(map(least_s, lean))
    if bound == inf:
        return None
    devices = [*roomiest(demand, device_budget - fixed, everything), *lean]
    device = next(share for share in devices if seconds(share, NOTHING) <= bound and least_s(share) <= bound)
    members = frozenset(device.streamed)
    hosts = [*roomiest(demand, available, members), *leanest(demand, available, members)]
    most = 1.05 * min(nbytes(demand, host.streamed) for host in hosts)
    return device, next(
        host for host in hosts if seconds(device, host) <= bound and nbytes(demand, host.streamed) <= most
    )


def _device_fixed(demand: Demand) -> int:
    """What is always on the device: with experts, a slot that those which are not held pass through."""
    assert demand.device_fixed is not None
    return sum(demand.device_fixed.values()) + visiting_bytes(demand.banks, 1)


def _host_share(demand: Demand) -> float:
    return share_of_host(demand.link_bps, demand.dense_bps) if demand.shared else 0.0


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
    crossing = frozenset(device.streamed if device is not None else ())
    host_share = _host_share(demand)
    shared = int(host_share * nbytes(demand, (crossing & demand.shared).difference(host.streamed)))
    left = budget - sum(demand.fixed.values()) - pinned - host.ring
    device_slots: tuple[int, ...] = ()
    visiting = 0
    if device is not None and device_budget is not None and demand.device_fixed is not None:
        used = sum(demand.device_fixed.values()) + nbytes(demand, device.pinned) + device.ring
        device_slots = share_device(demand.banks, device_budget - used)
        visiting = num_visiting(demand.banks, device_budget - used, device_slots)
    bank_slots = beside(demand.banks, share_slots(demand.banks, left), device_slots)
    bank_bytes = sum(bank.slot_bytes * slots for bank, slots in zip(demand.banks, bank_slots, strict=True))
    # a row of the token table costs one small read a token, so the table is the last thing worth its memory
    table = demand.embedding
    return Plan(
        budget_bytes=budget,
        minimum_bytes=minimum_budget(demand, device_budget),
        model_bytes=sum(block.nbytes for block in demand.blocks)
        + sum(bank.expert_bytes * bank.num_experts for bank in demand.banks)
        + (table.nbytes if table else 0),
        pinned_bytes=pinned,
        streamed_bytes=moved,
        ring_bytes=host.ring,
        kv_bytes=demand.fixed["kv"],
        workspace_bytes=demand.fixed["workspace"] + demand.fixed["vectors"] + demand.fixed.get("attention", 0),
        base_bytes=demand.fixed["base"],
        margin_bytes=demand.fixed["margin"],
        embedding_bytes=table.footprint if table and table.footprint <= left - bank_bytes else 0,
        edges={"nvme->ram": demand.disk_bps} | ({"ram->vram": demand.link_bps} if device is not None else {}),
        compute_s=demand.compute_s + demand.crossing_s,
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
        device_pinned_bytes=nbytes(demand, device.pinned) if device is not None else 0,
        device_ring_bytes=device.ring if device is not None else 0,
        link_bytes=nbytes(demand, crossing) - shared,
        shared_bytes=shared,
        host_share=host_share,
        demand=demand,
    )


def _placements(blocks: Sequence[BlockSpec], host: Share, device: Share | None) -> tuple[Placement, ...]:
    streamed = frozenset(host.streamed)

    def tier(index: int) -> TierName:
        if device is not None and index in device.pinned:
            return "vram"
        return "nvme" if index in streamed else "ram"

    return tuple(Placement(key=block.key, tier=tier(i), nbytes=block.nbytes) for i, block in enumerate(blocks))
