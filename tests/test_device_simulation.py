"""Decoding on three real machines on a virtual clock: the real plan, the real stream, and copies and kernels that take the
time their bytes take. Where the link is the limit it never idles; where it is not, it costs nothing.

Bytes stand for kilobytes, so that a model of 8 billion parameters is four megabytes of test memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import pytest

from offload.blocks import BlockKey, BlockSpec
from offload.demand import Demand
from offload.device_stream import DeviceStream
from offload.plan import Plan, make_plan
from offload.tiers.base import CancelToken
from offload.units import PAGE, align_up

SCALE = 1000
LAYERS, TOKENS = 32, 6
Q4_K = 144 / 256
SHAPES = {"q": 4096 * 4096, "k": 1024 * 4096, "v": 1024 * 4096, "o": 4096 * 4096,
          "gate": 14336 * 4096, "up": 14336 * 4096, "down": 4096 * 14336}  # fmt: skip


class Machine(NamedTuple):
    """Pinned copies over the link, and the card's memory, in bytes per second."""

    link_bps: float
    memory_bps: float


MACHINES = {
    "laptop, PCIe 3, 8 GB": Machine(6.0e9, 256e9),
    "desktop, PCIe 4, 16 GB": Machine(24e9, 500e9),
    "desktop, PCIe 5, 32 GB": Machine(50e9, 1500e9),
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0


class Copy:
    def __init__(self, clock: Clock, ends: float) -> None:
        self.clock, self.ends = clock, ends

    def done(self) -> bool:
        return self.clock.now >= self.ends

    def wait(self, cancel: CancelToken | None = None) -> None:
        self.clock.now = max(self.clock.now, self.ends)


class Link:
    """One copy after the other, each as long as its bytes take."""

    def __init__(self, clock: Clock, bandwidth: float) -> None:
        self.clock, self.bandwidth, self.free, self.busy = clock, bandwidth, 0.0, 0.0

    def copy_in(self, source: memoryview, offset: int) -> Copy:
        seconds = len(source) * SCALE / self.bandwidth
        self.free = max(self.free, self.clock.now) + seconds
        self.busy += seconds
        return Copy(self.clock, self.free)


@dataclass
class Run:
    """What decoding took: seconds a token, and the share of them in which the link was busy."""

    token_s: float
    link_busy: float


def dense_8b() -> tuple[tuple[BlockSpec, ...], tuple[tuple[int, ...], ...]]:
    blocks = tuple(
        BlockSpec(key=BlockKey("weight", layer, f"blk.{layer}.{name}"), nbytes=int(count * Q4_K / SCALE))
        for layer in range(LAYERS)
        for name, count in SHAPES.items()
    )
    groups, width = [], len(SHAPES)
    for layer in range(LAYERS):
        first = layer * width
        groups += [(first, first + 1, first + 2), (first + 3,), (first + 4, first + 5), (first + 6,)]
    return blocks, tuple(groups)


def demand(machine: Machine) -> Demand:
    blocks, groups = dense_8b()
    total = sum(block.nbytes for block in blocks) * SCALE
    return Demand(
        blocks=blocks, groups=groups, embedding=None, fixed={"base": 0, "margin": 0, "vectors": 0, "kv": 0, "workspace": 0},
        compute_s=total / machine.memory_bps, disk_bps=1e9, ctx=4096, trained_ctx=8192, prefill_tokens_per_pass=256,
        link_bps=machine.link_bps, device_fixed={"kv": 0},
    )  # fmt: skip


def plan_at(machine: Machine, share: float) -> Plan:
    need = demand(machine)
    everything = sum(block.footprint for block in need.blocks)
    return make_plan(need, 4 * everything, int(share * everything))


def simulate(machine: Machine, plan: Plan) -> Run:
    """Decodes; the first token fills the ring and does not count."""
    blocks, groups = plan.demand.blocks, plan.demand.groups
    moving = [block for block in blocks if block.key in plan.streamed]
    clock = Clock()
    link = Link(clock, machine.link_bps)
    pinned = {block.key: memoryview(bytearray(block.nbytes)) for block in moving}
    stream = DeviceStream(moving, link, 0, plan.device_ring_bytes, pinned, None)
    started = busy = 0.0
    for token in range(TOKENS + 1):
        if token == 1:
            started, busy = clock.now, link.busy - max(0.0, link.free - clock.now)
        for group in groups:
            needed = [blocks[i] for i in group if blocks[i].key in plan.streamed]
            for block in needed:
                stream.acquire(block.key, None)
            clock.now += sum(blocks[i].nbytes for i in group) * SCALE / machine.memory_bps
            stream.release(len(needed))
    elapsed = clock.now - started
    busy = link.busy - max(0.0, link.free - clock.now) - busy
    return Run(elapsed / TOKENS, busy / elapsed)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("name", MACHINES)
def test_the_link_never_idles_where_it_is_the_limit(name: str, share: float) -> None:
    machine = MACHINES[name]
    plan = plan_at(machine, share)
    run = simulate(machine, plan)
    link_s = plan.link_bytes * SCALE / machine.link_bps
    compute_s = plan.demand.compute_s
    if link_s > compute_s:
        assert run.link_busy >= 0.95, (run, link_s, compute_s)
    assert run.token_s <= 1.05 * max(link_s, compute_s) + 0.02 * min(link_s, compute_s), (run, link_s, compute_s)


@pytest.mark.parametrize("name", MACHINES)
def test_nothing_moves_where_everything_fits(name: str) -> None:
    assert plan_at(MACHINES[name], 1.05).link_bytes == 0


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_the_plan_moves_as_little_as_an_exhaustive_search_would(share: float) -> None:
    """Small cases: every set of blocks that leaves room for a ring through which the others can pass."""
    blocks = tuple(
        BlockSpec(key=BlockKey("weight", layer, f"blk.{layer}.{name}"), nbytes=size * PAGE)
        for layer in range(4)
        for name, size in (("q", 2), ("up", 5), ("down", 7))
    )
    need = Demand(
        blocks=blocks, groups=tuple((i,) for i in range(len(blocks))), embedding=None,
        fixed={"base": 0, "margin": 0, "vectors": 0, "kv": 0, "workspace": 0}, compute_s=1e-9, disk_bps=1e9, ctx=64,
        trained_ctx=64, prefill_tokens_per_pass=64, link_bps=1e9, device_fixed={"kv": 0},
    )  # fmt: skip
    everything = sum(block.footprint for block in blocks)
    budget = align_up(int(share * everything))

    def fits(pinned: tuple[int, ...]) -> bool:
        rest = [block.footprint for index, block in enumerate(blocks) if index not in pinned]
        ring = 2 * max(rest, default=0)  # the largest group and the largest block: see `ring_capacity`
        return sum(blocks[i].footprint for i in pinned) + ring <= budget

    best = min(
        everything - sum(blocks[i].footprint for i in pinned)
        for count in range(len(blocks) + 1)
        for pinned in combinations(range(len(blocks)), count)
        if fits(pinned)
    )
    found = make_plan(need, 4 * everything, budget)
    assert best <= found.link_bytes <= 1.05 * best + 2 * PAGE, "but for less than the smallest matrix"
