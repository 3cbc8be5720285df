"""Blocks through a device's ring against a plain model: copies that end late, sources that come late, a host's ring of one.

A copy reads its source when it ends, and sources that were given back are overwritten: whoever is too early sees garbage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload.blocks import BlockKey, BlockSpec
from offload.device_stream import DeviceStream
from offload.errors import Cancelled
from offload.prefetch.sequential import ring_capacity
from offload.tiers.base import CancelToken
from offload.units import align_up

BASE = 4096  # where the ring begins in the arena


def content(block: BlockSpec) -> bytes:
    return bytes((block.key.layer * 37 + i) % 223 for i in range(block.nbytes))


class LateCopy:
    def __init__(self, arena: LateArena, source: memoryview, offset: int) -> None:
        self.arena, self.source, self.offset, self.ended = arena, source, offset, False

    def done(self) -> bool:
        return self.ended

    def wait(self, cancel: CancelToken | None = None) -> None:
        if not self.ended and cancel is not None:
            cancel.raise_if_cancelled()
        while not self.ended:
            self.arena.end_one()


class LateArena:
    """Copies end in the order in which they were started, when they are waited for or told to."""

    def __init__(self, nbytes: int) -> None:
        self.memory, self.in_flight, self.started = bytearray(nbytes), deque[LateCopy](), list[LateCopy]()

    def copy_in(self, source: memoryview, offset: int) -> LateCopy:
        self.started.append(LateCopy(self, source, offset))
        self.in_flight.append(self.started[-1])
        return self.started[-1]

    def end_one(self) -> None:
        copy = self.in_flight.popleft()
        end, copy.ended = copy.offset + len(copy.source), True
        assert end <= len(self.memory)
        self.memory[copy.offset : end] = copy.source


class HostRing:
    """What `BlockStream` promises, with room for so many blocks; `arrived` of those not handed out are there."""

    def __init__(self, blocks: Sequence[BlockSpec], room: int) -> None:
        self.all, self.room, self.out = list(blocks), room, deque[bytearray]()
        self.replace({block.key for block in blocks})

    def fill(self) -> None:
        pass

    def is_ready(self) -> bool:
        return self.arrived > 0 and len(self.out) < self.room

    def acquire_view(self, key: BlockKey, cancel: CancelToken | None) -> memoryview:
        assert len(self.out) < self.room, "the host's ring is full: nothing would ever arrive"
        if not self.arrived and cancel is not None:
            cancel.raise_if_cancelled()
        self.arrived, self.position = max(0, self.arrived - 1), self.position + 1
        block = self.blocks[(self.position - 1) % len(self.blocks)]
        assert block.key == key
        self.out.append(bytearray(content(block)))
        return memoryview(self.out[-1])

    def release(self, count: int) -> None:
        for _ in range(count):
            gone = self.out.popleft()
            gone[:] = b"\xee" * len(gone)

    def restart(self) -> None:
        self.replace({block.key for block in self.blocks})

    def replace(self, keys: AbstractSet[BlockKey]) -> None:
        self.release(len(self.out))
        self.blocks, self.position, self.arrived = [block for block in self.all if block.key in keys], 0, 0


class DeviceRing(RuleBasedStateMachine):
    """Stages of blocks are taken one by one and given back together, as the scheduler does."""

    @initialize(
        stages=st.lists(st.lists(st.integers(1, 9000), min_size=1, max_size=3), min_size=1, max_size=5),
        slack=st.sampled_from([0.0, 0.5, 9.0]), room=st.integers(1, 3), data=st.data(),
    )  # fmt: skip
    def start(self, stages: list[list[int]], slack: float, room: int, data: st.DataObject) -> None:
        sizes = [size for stage in stages for size in stage]
        self.blocks = [BlockSpec(key=BlockKey("weight", i, f"b{i}"), nbytes=size) for i, size in enumerate(sizes)]
        self.stage_of = [number for number, stage in enumerate(stages) for _ in stage]
        pinned = data.draw(st.frozensets(st.sampled_from(self.blocks)))
        self.held, self.lengths = sorted(map(self.blocks.index, pinned)), list(sizes)
        held = {block.key: memoryview(bytearray(content(block))) for block in pinned}
        self.host = HostRing([block for block in self.blocks if block not in pinned], room)
        nbytes = ring_capacity([[align_up(size) for size in stage] for stage in stages], slack)
        self.arena, self.has_room_for_all = LateArena(BASE + nbytes), nbytes > 2 * sum(map(align_up, sizes))
        self.stream = DeviceStream(self.blocks, self.arena, BASE, nbytes, held, self.host)  # type: ignore[arg-type]
        self.begin(range(len(sizes)))

    def begin(self, members: Sequence[int]) -> None:
        self.cycle, self.position = list(members), 0
        self.taken: list[tuple[int, int]] = []  # which block, and where it was said to be
        self.first_copy = len(self.arena.started)

    def in_ring(self) -> int:
        return len(self.arena.started) - self.first_copy - self.position + len(self.taken)

    def stage_is_whole(self) -> bool:
        stages = [self.stage_of[index] for index in self.cycle]
        return bool(self.taken) and len(self.taken) == stages.count(self.stage_of[self.taken[0][0]])

    @precondition(lambda self: self.cycle and not self.stage_is_whole())
    @rule(cancelled=st.sampled_from([False, False, True]))
    def acquire(self, cancelled: bool) -> None:
        index, copies = (
            self.cycle[self.position % len(self.cycle)],
            self.arena.started[self.first_copy + self.position :],
        )
        was_ready = bool(copies) and copies[0].ended
        cancel = CancelToken()
        if cancelled:
            cancel.cancel()
        try:
            arrival = self.stream.acquire(self.blocks[index].key, cancel)
        except Cancelled:
            assert cancelled and not was_ready
            self.restart()
            return
        assert arrival.was_ready == was_ready
        assert len(self.arena.started[self.first_copy + self.position].source) == self.lengths[index]
        self.taken.append((index, arrival.address))
        self.position += 1

    @precondition(lambda self: self.stage_is_whole())
    @rule()
    def release(self) -> None:
        self.stream.release(len(self.taken))
        self.taken.clear()

    @rule(count=st.integers(1, 4))
    def sources_arrive(self, count: int) -> None:
        self.host.arrived = min(self.host.arrived + count, len(self.host.blocks))

    @rule(count=st.integers(1, 4))
    def copies_end(self, count: int) -> None:
        for _ in range(min(count, len(self.arena.in_flight))):
            self.arena.end_one()

    @rule()
    def fill(self) -> None:
        self.stream.fill()
        if self.has_room_for_all and self.cycle and self.in_ring() < len(self.cycle):
            assert not self.host.is_ready(), "the next block is there and there is room for it"
        assert self.arena.in_flight or not self.host.out, "what has been copied is given back"

    @rule()
    def restart(self) -> None:
        self.stream.restart()
        assert not self.arena.in_flight, "a copy still writes into a ring that was reset"
        self.begin(self.cycle)

    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        members = data.draw(st.frozensets(st.integers(0, len(self.blocks) - 1)))
        self.stream.replace({self.blocks[i].key for i in members})
        self.begin(sorted(members))

    @rule(data=st.data())
    def shorten(self, data: st.DataObject) -> None:
        members = data.draw(st.frozensets(st.sampled_from(self.held))) if self.held else frozenset()
        self.lengths = [block.nbytes for block in self.blocks]
        for index in members:
            self.lengths[index] = data.draw(st.integers(1, self.blocks[index].nbytes))
        self.stream.shorten({self.blocks[index].key: self.lengths[index] for index in members})
        self.begin(self.cycle)

    @invariant()
    def what_was_taken_is_whole_and_nothing_is_copied_over_it(self) -> None:
        live = [(address, self.lengths[index]) for index, address in self.taken]
        for (index, _), (address, nbytes) in zip(self.taken, live, strict=True):
            assert self.arena.memory[address : address + nbytes] == content(self.blocks[index])[:nbytes]
        assert self.in_ring() <= len(self.cycle), "a block is there twice"
        last = BASE
        for address, nbytes in sorted(live + [(copy.offset, len(copy.source)) for copy in self.arena.in_flight]):
            assert address >= last
            last = address + nbytes


TestDeviceRing = DeviceRing.TestCase
TestDeviceRing.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
