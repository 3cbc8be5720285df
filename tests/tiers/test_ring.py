"""The ring against a naive reference that only remembers which bytes are taken."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from offload.errors import WouldBlock
from offload.tiers.ring import RingAllocator
from offload.units import PAGE

CAPACITY = 10 * PAGE


class RingMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ring = RingAllocator(CAPACITY)
        self.regions = []  # in order of allocation: [region, released]
        self.numbers = set()

    @rule(nbytes=st.integers(1, CAPACITY))
    def allocate(self, nbytes):
        pages = -(-nbytes // PAGE)
        try:
            region = self.ring.try_allocate(nbytes)
        except WouldBlock:
            assert self.regions, "an empty ring must take anything up to its capacity"
            assert not self._fits(pages)
            return
        assert region.nbytes == pages * PAGE and region.offset % PAGE == 0
        assert 0 <= region.offset < region.offset + region.nbytes <= CAPACITY
        assert region.number not in self.numbers
        for other, _ in self.regions:
            assert region.offset + region.nbytes <= other.offset or other.offset + other.nbytes <= region.offset
        self.numbers.add(region.number)
        self.regions.append([region, False])

    @precondition(lambda self: any(not released for _, released in self.regions))
    @rule(data=st.data())
    def release(self, data):
        entry = data.draw(st.sampled_from([entry for entry in self.regions if not entry[1]]))
        entry[1] = True
        self.ring.release(entry[0].number)
        while self.regions and self.regions[0][1]:
            self.regions.pop(0)

    @rule()
    def reset(self):
        self.ring.reset()
        self.regions.clear()

    @invariant()
    def statistics_agree(self):
        statistics = self.ring.statistics()
        assert statistics.used_bytes == sum(region.nbytes for region, _ in self.regions)
        assert statistics.regions == len(self.regions)
        assert statistics.allocations == len(self.numbers)

    def _fits(self, pages):
        """Whether a run of free pages lies directly after the newest region, or at 0 when the lap ends before."""
        taken = set()
        for region, _ in self.regions:
            taken.update(range(region.offset // PAGE, (region.offset + region.nbytes) // PAGE))
        newest, oldest = self.regions[-1][0], self.regions[0][0]
        head = (newest.offset + newest.nbytes) // PAGE
        starts = [head] if newest.offset < oldest.offset else [head, 0]
        return any(
            start + pages <= CAPACITY // PAGE and not taken & set(range(start, start + pages)) for start in starts
        )


RingMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRing = RingMachine.TestCase


def test_out_of_order_release_frees_in_order():
    ring = RingAllocator(4 * PAGE)
    first, second, third = (ring.try_allocate(PAGE) for _ in range(3))
    ring.release(second.number)
    ring.release(third.number)
    assert ring.try_allocate(PAGE).offset == 3 * PAGE
    with pytest.raises(WouldBlock):
        ring.try_allocate(PAGE)
    ring.release(first.number)
    assert ring.try_allocate(3 * PAGE).offset == 0


def test_a_region_that_does_not_fit_before_the_end_starts_at_zero():
    ring = RingAllocator(4 * PAGE)
    ring.release(ring.try_allocate(2 * PAGE).number)
    first = ring.try_allocate(2 * PAGE)
    assert ring.try_allocate(PAGE).offset == 2 * PAGE
    ring.release(first.number)
    assert ring.try_allocate(2 * PAGE).offset == 0
    assert ring.statistics().laps == 2


def test_numbers_survive_a_reset():
    ring = RingAllocator(PAGE)
    number = ring.try_allocate(1).number
    ring.reset()
    assert ring.try_allocate(1).number > number


def test_wrong_releases_are_caught():
    ring = RingAllocator(2 * PAGE)
    first, second = ring.try_allocate(1), ring.try_allocate(1)
    ring.release(second.number)
    for number in (second.number, second.number + 1):
        with pytest.raises(AssertionError):
            ring.release(number)
    ring.release(first.number)
    with pytest.raises(AssertionError):
        ring.release(first.number)
