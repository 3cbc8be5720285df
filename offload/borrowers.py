"""What idle memory holds while it is lent: blocks of dense weights that are streamed otherwise, or more slots for experts.

A block that has to leave is streamed again from the next pass on, one that gets memory is read once and stays. Slots come
empty, and are filled as tokens choose; when they go, the experts in them that are worth most move to others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload.blocks import BlockKey
from offload.expert_slots import ExpertBank
from offload.plan import Plan
from offload.residency import Residency
from offload.tiers.base import CancelToken, Reader
from offload.tiers.ram import HUGE_PAGE, Slab
from offload.units import align_up


class BlockBorrower:
    """The streamed blocks that the plan lets borrow, in its order.

    Args:
        slab: memory for them, not resident yet.
        moved: told the keys of the blocks that are streamed from now on.
    """

    def __init__(
        self, plan: Plan, slab: Slab, residency: Residency, reader: Reader,
        moved: Callable[[frozenset[BlockKey]], None],
    ) -> None:  # fmt: skip
        self._plan = plan
        self._slab = slab
        self._residency = residency
        self._reader = reader
        self._moved = moved
        self._count = 0

    @property
    def nbytes(self) -> int:
        """See `Borrower.nbytes`."""
        return self._end(self._count)

    def give_back(self, positions: int, *, prompt: bool) -> None:
        """See `Borrower.give_back`."""
        allowed = self._plan.on_loan(positions, prompt=prompt)
        if allowed < self._count:
            self._residency.unpin(self._plan.borrowers[allowed : self._count])
            self._stream_all_but(allowed)
            self._count = allowed
            self._discard()

    def take(self, positions: int, cancel: CancelToken | None) -> bool:
        """See `Borrower.take`."""
        allowed = self._plan.on_loan(positions)
        waits = allowed > self._count
        if waits:
            self._pin(allowed, cancel)
        return waits

    def _pin(self, count: int, cancel: CancelToken | None) -> None:
        blocks, start = self._plan.borrowers[self._count : count], self._end(self._count)
        self._stream_all_but(count)
        try:
            self._slab.populate(start, self._end(count) - start)
            self._residency.pin(blocks, self._slab, self._reader, offset=start, cancel=cancel)
        except BaseException:
            self._reader.cancel_pending()
            self._reader.drain()  # nobody may write into the slab any more
            self._residency.unpin(blocks)
            self._stream_all_but(self._count)
            self._discard()
            raise
        self._count = count
        self._residency.read_ahead()

    def _stream_all_but(self, count: int) -> None:
        """The first `count` borrowers are not streamed, all others are."""
        keys = self._plan.streamed.difference(block.key for block in self._plan.borrowers[:count])
        self._residency.stream(keys)
        self._moved(keys)

    def _discard(self) -> None:
        """Gives back what lies behind the blocks that stay. A huge page that one of them shares stays with it."""
        kept = min(align_up(self._end(self._count), HUGE_PAGE), self._slab.nbytes)
        self._slab.discard(kept, self._slab.nbytes - kept)

    def _end(self, count: int) -> int:
        return sum(block.footprint for block in self._plan.borrowers[:count])


class SlotBorrower:
    """Banks whose number of slots follows what is idle.

    Args:
        banks: in the plan's order. settle: called before slots go: nothing may be on its way into one.
    """

    def __init__(self, plan: Plan, banks: Sequence[ExpertBank], settle: Callable[[], None]) -> None:
        self._plan = plan
        self._banks = banks
        self._settle = settle

    @property
    def nbytes(self) -> int:
        """See `Borrower.nbytes`."""
        return sum(
            (bank.num_slots - slots) * demand.expert_bytes
            for bank, slots, demand in zip(self._banks, self._plan.bank_slots, self._plan.demand.banks, strict=True)
        )

    def give_back(self, positions: int, *, prompt: bool) -> None:
        """See `Borrower.give_back`."""
        allowed = self._plan.bank_slots_at(positions, prompt=prompt)
        if any(slots < bank.num_slots for bank, slots in zip(self._banks, allowed, strict=True)):
            self._settle()
        for bank, slots in zip(self._banks, allowed, strict=True):
            bank.resize(min(slots, bank.num_slots))

    def take(self, positions: int, cancel: CancelToken | None) -> bool:
        """See `Borrower.take`. Never waits."""
        del cancel
        for bank, slots in zip(self._banks, self._plan.bank_slots_at(positions), strict=True):
            bank.resize(max(slots, bank.num_slots))
        return False
