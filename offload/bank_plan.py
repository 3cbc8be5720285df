"""Memory for experts: what a model needs, how banks share it, and how often experts will be found there. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from offload.units import PAGE, align_up

DEVICE_ALIGNMENT: Final = 256  # bytes: what a device reads at once
Curve = Sequence[tuple[float, float]]
"""Shares of all experts that memory holds, ascending, between 0 and 1, and the hit rate at each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BankDemand:
    """Experts of one shape, of which a token needs a few.

    Attributes:
        slot_bytes: memory that one takes. expert_bytes: that are read for it.
        num_experts: of all layers. least_slots: without which a token cannot be computed.
        used: how many a token needs, of all layers.
        curve: hit rates at shares of `num_experts` that memory holds, from a trace; empty when none is known.
    """

    slot_bytes: int
    expert_bytes: int
    num_experts: int
    least_slots: int
    used: int
    curve: Curve = ()

    @property
    def device_bytes(self) -> int:
        """Memory that one takes on a device: its matrices, each aligned."""
        return align_up(self.expert_bytes + 3 * DEVICE_ALIGNMENT, DEVICE_ALIGNMENT)

    def missed_bytes(self, slots: int) -> int:
        """Bytes read for a token when memory holds `slots` of the experts."""
        share = slots / self.num_experts
        return round(self.used * (1 - interpolate(self.curve, share)) * self.expert_bytes)


def least_bytes(banks: Sequence[BankDemand]) -> int:
    """Memory without which a token cannot be computed."""
    return sum(bank.slot_bytes * bank.least_slots for bank in banks)


def share_slots(banks: Sequence[BankDemand], available: int) -> tuple[int, ...]:
    """Shares memory among banks: where a trace tells what each would make of it, so that the fewest bytes are missed."""
    known = banks and all(bank.curve for bank in banks)
    return _by_gain(banks, available) if known else _in_proportion(banks, available)


def share_device(banks: Sequence[BankDemand], available: int) -> tuple[int, ...]:
    """How many experts of each bank a device holds for good in so many bytes, beside slots that the others can visit."""
    on_device = [replace(bank, slot_bytes=bank.device_bytes, least_slots=0) for bank in banks]
    available -= PAGE * len(banks)
    held = share_slots(on_device, max(0, available))
    if _all_held(banks, held):
        return held
    if num_visiting(banks, available, ()) < _wanted_visiting(banks):
        return (0,) * len(banks)
    return share_slots(on_device, available - visiting_bytes(banks, _wanted_visiting(banks)))


def num_visiting(banks: Sequence[BankDemand], available: int, held: Sequence[int]) -> int:
    """How many slots a device has for experts that it does not hold: for two choices of a layer, one computed, one copied.

    Fewer where those do not fit beside the held ones, but one at least; none where it holds all.
    """
    if _all_held(banks, held):
        return 0
    left = available - device_bytes(banks, held)
    return next((count for count in range(_wanted_visiting(banks), 1, -1) if visiting_bytes(banks, count) <= left), 1)


def _wanted_visiting(banks: Sequence[BankDemand]) -> int:
    return 2 * max(bank.least_slots for bank in banks)


def visiting_bytes(banks: Sequence[BankDemand], count: int) -> int:
    """Memory on the device for so many slots, each for an expert of any bank."""
    return align_up(count * max((bank.device_bytes for bank in banks), default=0))


def device_bytes(banks: Sequence[BankDemand], held: Sequence[int], visiting: int = 0) -> int:
    """Memory on the device for so many experts of each bank, and slots for visitors."""
    return sum(align_up(bank.device_bytes * count) for bank, count in zip(banks, held, strict=False)) + visiting_bytes(
        banks, visiting
    )


def _all_held(banks: Sequence[BankDemand], held: Sequence[int]) -> bool:
    return sum(held) == sum(bank.num_experts for bank in banks)


def beside(banks: Sequence[BankDemand], slots: tuple[int, ...], held: tuple[int, ...]) -> tuple[int, ...]:
    """No more slots than there are experts that no device holds, and never fewer than the least."""
    if not held:
        return slots
    return tuple(
        min(count, max(bank.least_slots, bank.num_experts - there))
        for bank, count, there in zip(banks, slots, held, strict=True)
    )


def _by_gain(banks: Sequence[BankDemand], available: int) -> tuple[int, ...]:
    """Always to the bank that a byte more spares the most. More memory never means fewer slots for any."""
    slots, left = [bank.least_slots for bank in banks], available - least_bytes(banks)
    steps = [(-gain, index, stop) for index, bank in enumerate(banks) for gain, stop in _gains(bank)]
    for _, index, stop in sorted(steps):
        count = min(stop - slots[index], left // banks[index].slot_bytes)
        slots[index] += count
        left -= count * banks[index].slot_bytes
        if slots[index] < stop:
            break
    return tuple(slots)


def _gains(bank: BankDemand) -> list[tuple[float, int]]:
    """Bytes spared for each byte of memory, up to so many slots, in falling order: the curve's upper hull, step by step."""
    marks = {bank.least_slots, bank.num_experts}
    marks.update(int(share * bank.num_experts) for share, _ in bank.curve)
    points = [(slots, bank.missed_bytes(slots)) for slots in sorted(marks) if slots >= bank.least_slots]
    hull: list[tuple[int, int]] = []
    for slots, missed in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], (slots, missed)):
            hull.pop()
        hull.append((slots, missed))
    return [(_slope(left, right) / bank.slot_bytes, right[0]) for left, right in pairwise(hull)]


def _slope(left: tuple[int, int], right: tuple[int, int]) -> float:
    return (left[1] - right[1]) / (right[0] - left[0])


def _in_proportion(banks: Sequence[BankDemand], available: int) -> tuple[int, ...]:
    """What is left behind the least goes to all in proportion to what they could hold."""
    left = available - least_bytes(banks)
    wanted = sum(bank.slot_bytes * (bank.num_experts - bank.least_slots) for bank in banks)
    share = min(1.0, left / wanted) if wanted else 1.0
    return tuple(bank.least_slots + int((bank.num_experts - bank.least_slots) * share) for bank in banks)


def interpolate(curve: Curve, share: float) -> float:
    """The hit rate at any share; with no curve, that of experts that are all chosen equally often."""
    points = [(0.0, 0.0), *curve, (1.0, 1.0)]
    for (left, low), (right, high) in pairwise(points):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    return 1.0
