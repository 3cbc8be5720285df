"""Decoding on three real machines on a virtual clock: the real plan, the real stream, and copies and kernels that take the
time their bytes take. Where an edge is the limit it never idles; where it is not, it costs nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest

from offload.blocks import BlockKey, BlockSpec, Extent
from offload.demand import Demand
from offload.device_stream import DeviceStream
from offload.plan import Plan
from offload.planning import make_plan
from offload.stream import BlockStream
from offload.tiers.base import CancelToken
from offload.tiers.ram import Slab
from offload.units import PAGE, align_up

LAYERS, TOKENS = 32, 6
Q4_K = 144 / 256
SHAPES = {"q": 4096 * 4096, "k": 1024 * 4096, "v": 1024 * 4096, "o": 4096 * 4096,
          "gate": 14336 * 4096, "up": 14336 * 4096, "down": 4096 * 14336}  # fmt: skip


class Machine(NamedTuple):
    """Reads of the disk, pinned copies over the link, and the card's memory, in bytes per second."""

    disk_bps: float
    link_bps: float
    memory_bps: float


MACHINES = {
    "laptop, PCIe 3, 8 GB": Machine(3.0e9, 6.0e9, 256e9),
    "desktop, PCIe 4, 16 GB": Machine(5.0e9, 24e9, 500e9),
    "desktop, PCIe 5, 32 GB": Machine(7.0e9, 50e9, 1500e9),
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0


class Transfer:
    def __init__(self, clock: Clock, ends: float) -> None:
        self.clock, self.ends = clock, ends

    def done(self) -> bool:
        return self.clock.now >= self.ends

    def wait(self, cancel: CancelToken | None = None) -> None:
        self.clock.now = max(self.clock.now, self.ends)


class Edge:
    """One transfer after the other, each as long as its bytes take: a link and its arena, a disk and its reader, or a card.

    Args:
        behind: whose work that was queued before has to end first, as copies wait for kernels.
    """

    def __init__(self, clock: Clock, bandwidth: float, behind: Edge | None = None) -> None:
        self.clock, self.bandwidth, self.behind, self.free, self.busy = clock, bandwidth, behind, 0.0, 0.0

    def copy_in(self, source: memoryview, offset: int) -> Transfer:
        return self.move(len(source))

    def read_extent(self, extent: Extent, destination: memoryview) -> Transfer:
        return self.move(extent.nbytes)

    def move(self, nbytes: int) -> Transfer:
        seconds = nbytes / self.bandwidth
        self.free = max(self.free, self.clock.now, 0.0 if self.behind is None else self.behind.free) + seconds
        self.busy += seconds
        return Transfer(self.clock, self.free)

    def busy_until_now(self) -> float:
        return self.busy - max(0.0, self.free - self.clock.now)


class HostStream(BlockStream):
    """Its reads start at once: what its thread takes for that is nothing on this clock."""

    def fill(self) -> None:
        with self._lock:
            self._start_reads()


@dataclass
class Run:
    """What decoding took: seconds a token, and the shares of them in which the edges were busy."""

    token_s: float
    link_busy: float
    disk_busy: float


def extent(count: int) -> Extent:
    return Extent(path=Path("model.gguf"), offset=0, nbytes=int(count * Q4_K))


def dense_8b() -> tuple[tuple[BlockSpec, ...], tuple[tuple[int, ...], ...]]:
    blocks = tuple(
        BlockSpec(key=BlockKey("weight", layer, f"blk.{layer}.{name}"), nbytes=int(count * Q4_K), extent=extent(count))
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
    return Demand(
        blocks=blocks, groups=groups, embedding=None, fixed={"base": 0, "margin": 0, "vectors": 0, "kv": 0, "workspace": 0},
        compute_s=sum(block.nbytes for block in blocks) / machine.memory_bps, disk_bps=machine.disk_bps, ctx=4096,
        trained_ctx=8192, prefill_tokens_per_pass=256, link_bps=machine.link_bps, device_fixed={"kv": 0},
    )  # fmt: skip


def plan_at(machine: Machine, vram_share: float, ram_share: float = 1.0) -> Plan:
    need = demand(machine)
    everything = sum(block.footprint for block in need.blocks)
    return make_plan(need, int(ram_share * everything), int(vram_share * everything))


def simulate(machine: Machine, plan: Plan, *, queued: bool = False) -> Run:
    """Decodes; the first token fills the rings and does not count.

    Args:
        queued: kernels are queued and awaited at the end of a token, as on CUDA; else each is awaited, as on `torch:cpu`.
    """
    blocks, groups = plan.demand.blocks, plan.demand.groups
    moving = [block for block in blocks if block.key in plan.streamed]
    on_disk = [block for block in moving if block.key in plan.from_disk]
    clock = Clock()
    card, disk = Edge(clock, machine.memory_bps), Edge(clock, machine.disk_bps)
    link = Edge(clock, machine.link_bps, behind=card)
    memory = memoryview(bytearray(max(block.nbytes for block in blocks)))  # never touched: any bytes will do
    pinned = {block.key: memory[: block.nbytes] for block in moving if block.key not in plan.from_disk}
    lower = HostStream(on_disk, Slab(plan.ring_bytes, prefault=False), disk) if on_disk else None  # type: ignore[arg-type]
    stream = DeviceStream(moving, link, 0, plan.device_ring_bytes, pinned, lower)
    before = (0.0, 0.0, 0.0)
    for token in range(TOKENS + 1):
        if token == 1:
            before = clock.now, link.busy_until_now(), disk.busy_until_now()
        for group in groups:
            needed = [blocks[i] for i in group if blocks[i].key in plan.streamed]
            for block in needed:
                stream.acquire(block.key, None)
            kernels = card.move(sum(blocks[i].nbytes for i in group))
            if not queued:
                kernels.wait()
            stream.release(len(needed))
        kernels.wait()
    if lower is not None:
        lower.close()
    elapsed, link_s, disk_s = (
        clock.now - before[0],
        link.busy_until_now() - before[1],
        disk.busy_until_now() - before[2],
    )
    return Run(elapsed / TOKENS, link_s / elapsed, disk_s / elapsed)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("name", MACHINES)
def test_the_link_never_idles_where_it_is_the_limit(name: str, share: float) -> None:
    machine = MACHINES[name]
    plan = plan_at(machine, share)
    run = simulate(machine, plan)
    link_s = plan.link_bytes / machine.link_bps
    compute_s = plan.demand.compute_s
    if link_s > compute_s:
        assert run.link_busy >= 0.95, (run, link_s, compute_s)
    assert run.token_s <= 1.05 * max(link_s, compute_s) + 0.02 * min(link_s, compute_s), (run, link_s, compute_s)


@pytest.mark.parametrize("queued", [False, True], ids=["kernels awaited", "kernels queued"])
@pytest.mark.parametrize("name", MACHINES)
def test_the_slowest_of_disk_link_and_card_never_waits_for_the_others(name: str, queued: bool) -> None:
    """Blocks on disk pass through both rings. The card computes as fast as it can, or takes 0.7 or 1.4 times as long as the
    slower edge, which leaves a margin: of two that take equally long each waits for the other now and then.
    """
    machine, found = MACHINES[name], Counter[str]()
    for vram, ram in product((0.1, 0.25, 0.5, 0.75, 0.9), (0.1, 0.25, 0.5, 0.75)):
        plan = plan_at(machine, vram, ram)
        sizes = {block.key: block.nbytes for block in plan.demand.blocks}
        link_s = sum(sizes[key] for key in plan.streamed) / machine.link_bps
        disk_s = sum(sizes[key] for key in plan.from_disk) / machine.disk_bps
        for compute_s in (plan.demand.compute_s, 0.7 * max(link_s, disk_s), 1.4 * max(link_s, disk_s)):
            seconds = {"disk": disk_s, "link": link_s, "card": compute_s}
            *_, second, slowest = sorted(seconds, key=lambda edge: seconds[edge])
            if not disk_s or seconds[slowest] < 1.25 * seconds[second]:
                continue
            run = simulate(machine._replace(memory_bps=sum(sizes.values()) / compute_s), plan, queued=queued)
            busy = {"disk": run.disk_busy, "link": run.link_busy, "card": compute_s / run.token_s}
            least = (
                0.88 if queued and slowest == "card" else 0.95
            )  # a copy waits for all kernels that were queued before
            assert busy[slowest] >= least, (vram, ram, seconds, run)
            found[slowest] += 1
    assert all(found[edge] > 3 for edge in ("disk", "link", "card")), found


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
