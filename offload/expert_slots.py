"""The slots of a bank in memory, and what is in them. Decides nothing but which slot: who goes is the policy's choice.

free        nothing is in them
held        experts that lie elsewhere for good, on a device, and are never read again
resident    experts that tokens have used; the policy says which of them goes
reserve     a few slots for experts that are read ahead. A guess that is used becomes resident, and the reserve takes
            another slot for it; one that is not makes room for a later guess, so that it costs no resident its place
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import numpy as np

from offload.bitplanes import expand, refine
from offload.blocks import ExpertKey, Extent
from offload.expert_bank import BankSpec
from offload.kernels.batch import Bytes, ExpertPlace
from offload.models.base import Stored
from offload.models.checkpoint.base import TensorInfo
from offload.packing import Pack
from offload.prefetch.eviction import Eviction
from offload.tiers.base import Group, Reader, TransferHandle
from offload.tiers.ram import HUGE_PAGE, Slab
from offload.units import align_up
from offload.unpacking import unpack

HELD: Final = 1 << 30
"""Slots from here on are not in the bank's memory: who computes knows where number `slot - HELD` lies."""
Form = Literal["whole", "coarse", "rest"]
"""What is read of an expert: all of it, or one of the halves of its bits, see `bitplanes`."""


class Flight(NamedTuple):
    """An expert, or a half of its bits, on its way into a slot."""

    key: ExpertKey
    slot: int
    handle: TransferHandle
    form: Form = "whole"


class ExpertBank:
    """See the module. Driver thread only.

    Args:
        slab: memory of at least `num_slots` slots, of which these are resident.
        reserve: how many slots experts may be read ahead into. pack: where their halves are, if there is one.
        settle: waits until nobody reads what was given up, if that can be; called before slots are read into.
    """

    def __init__(
        self, spec: BankSpec, slab: Slab, num_slots: int, reader: Reader, policy: Eviction, reserve: int = 0,
        pack: Pack | None = None, settle: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        assert num_slots * spec.stride <= slab.nbytes, (num_slots, spec.stride, slab.nbytes)
        self._most_slots = slab.nbytes // spec.stride
        self.spec = spec
        self.num_slots = num_slots
        self.reserve = reserve
        self._slab = slab
        self._reader = reader
        self._policy = policy
        self._layers = {layer.layer: layer for layer in spec.layers}
        self._offsets = {layer.layer: spec.offsets(layer) for layer in spec.layers}
        self._free = deque(range(num_slots))
        self._resident: dict[ExpertKey, int] = {}
        self._pack = pack
        self._settle_readers = settle
        self._coarse: set[ExpertKey] = set()
        self._held: dict[ExpertKey, int] = {}
        self._reserved = 0  # slots of the reserve: idle ones, guesses that have arrived, and those on their way
        self._idle: list[int] = []
        self._guesses: OrderedDict[ExpertKey, int] = OrderedDict()

    def place(self, layer: int) -> ExpertPlace:
        """What kernels need to know."""
        return ExpertPlace(
            self._slab.address, self.spec.stride, self._most_slots, self._offsets[layer], is_resident=False
        )

    def slot(self, key: ExpertKey) -> int | None:
        """Where an expert is, or None."""
        slot = self._resident.get(key)
        if slot is None:
            slot = self._guesses.get(key)
        return self._held.get(key) if slot is None else slot

    @property
    def has_free_slot(self) -> bool:
        """Whether an expert can come without another one going."""
        return bool(self._free)

    def is_coarse(self, key: ExpertKey) -> bool:
        """Whether a resident expert lacks the low half of its bits."""
        return key in self._coarse

    def chosen(self, layer: int, experts: Sequence[int]) -> None:
        """A token needs these experts, wherever they are."""
        self._policy.chosen(layer, experts)

    def matrices(self, key: ExpertKey) -> list[memoryview]:
        """Gate, up and down of a resident expert, in its slot."""
        base = self._resident[key] * self.spec.stride
        matrices = self._layers[key.layer].experts[key.expert]
        return [
            self._slab.view(base + offset, matrix.nbytes)
            for matrix, offset in zip(matrices, self._offsets[key.layer], strict=True)
        ]

    def hold(self, key: ExpertKey, number: int) -> None:
        """The expert lies elsewhere from now on, under this number."""
        self._held[key] = HELD + number

    def forget(self, key: ExpertKey) -> None:
        """Gives up the slot of a resident expert."""
        self._policy.remove(key)
        self._coarse.discard(key)
        self._free.append(self._resident.pop(key))

    def resize(self, num_slots: int) -> None:
        """Has so many slots from now on. When slots go, the least useful experts do. Nothing may be on its way.

        Raises:
            AllocationError: the system has no memory.
        """
        if num_slots > self.num_slots:
            start, end = (align_up(count * self.spec.stride) for count in (self.num_slots, num_slots))
            self._slab.populate(start, min(end, self._slab.nbytes) - start)
            self._free.extend(range(self.num_slots, num_slots))
        elif num_slots < self.num_slots:
            self._vacate(self.num_slots - num_slots, self.spec.layers[0].layer, ())
            self._shelter(num_slots)
            kept = min(align_up(num_slots * self.spec.stride, HUGE_PAGE), self._slab.nbytes)
            self._slab.discard(kept, self._slab.nbytes - kept)
        self.num_slots = num_slots

    def _shelter(self, end: int) -> None:
        """Moves what lies in slots from `end` on to free ones before it, and gives those up."""
        self._reserved -= len(self._idle) + len(self._guesses)
        self._free.extend([*self._idle, *self._guesses.values()])
        self._idle.clear()
        self._guesses.clear()
        free = [slot for slot in self._free if slot < end]
        base, stride = self._slab.address, self.spec.stride
        for key, slot in self._resident.items():
            if slot >= end:
                self._resident[key] = free.pop()
                ctypes.memmove(base + self._resident[key] * stride, base + slot * stride, stride)
        self._free = deque(free)

    # ---- what is needed

    def start(
        self, keys: Sequence[ExpertKey], layer: int, keep: Collection[ExpertKey],
        forms: Mapping[ExpertKey, Form] = MappingProxyType({}),
    ) -> list[Flight]:  # fmt: skip
        """Starts reading experts in one submission; fewer than `keys` where slots hold what must stay.

        Args:
            layer: where the token is. keep: experts that must not go. forms: of those that are not read whole.

        Raises:
            StorageError: a file has shrunk.
        """
        self._vacate(len(keys), layer, keep, more=self.reserve - self._reserved)
        taken = [(key, self._free.popleft()) for key in keys[: len(self._free)]]
        return self._read(taken, self._free, forms, background=False)

    def land(self, flight: Flight, *, passing: bool) -> None:
        """A flight has ended well, and its expert is needed."""
        if flight.form == "rest":
            self._refine(flight)
            return
        if flight.form == "coarse":
            self._expand(flight)
            self._coarse.add(flight.key)
        else:
            self._settle(flight)
        self._resident[flight.key] = flight.slot
        self._policy.add(flight.key, passing=passing)

    def drop(self, flight: Flight) -> None:
        """A flight has ended, and nobody wants to know how."""
        self._free.append(flight.slot)

    # ---- what may be needed

    def start_ahead(self, keys: Sequence[ExpertKey], layer: int, keep: Collection[ExpertKey]) -> list[Flight]:
        """Starts reading experts in the background, as far as the reserve has room. Arguments as of `start`."""
        wanted = min(self.reserve - self._reserved, len(keys) - len(self._idle))
        if wanted > 0:
            self._vacate(wanted, layer, keep)
            for _ in range(min(wanted, len(self._free))):
                self._idle.append(self._free.popleft())
                self._reserved += 1
        while len(self._idle) < len(keys) and self._guesses:
            self._idle.append(self._guesses.popitem(last=False)[1])
        taken = [(key, self._idle.pop()) for key in keys[: len(self._idle)]]
        return self._read(taken, self._idle, {}, background=True)

    def land_ahead(self, flight: Flight) -> None:
        """A background flight has ended, and nobody has asked for its expert yet."""
        if flight.handle.error is not None:
            self._idle.append(flight.slot)
        else:
            self._settle(flight)
            self._guesses[flight.key] = flight.slot

    def claim(self, key: ExpertKey) -> bool:
        """A token needs `key`: whether it had been read ahead. From now on it is resident."""
        slot = self._guesses.pop(key, None)
        if slot is None:
            return False
        self._reserved -= 1
        self._resident[key] = slot
        self._policy.add(key)
        return True

    def release(self, flight: Flight) -> None:
        """A background flight is needed now: its slot is no longer of the reserve."""
        del flight
        self._reserved -= 1

    # ---- inner

    def _vacate(self, count: int, layer: int, keep: Collection[ExpertKey], more: int = 0) -> None:
        """Makes slots free until there are `count`, or until all others must stay; if any have to go, `more` at once."""
        missing = count - len(self._free)
        if missing > 0:
            for victim in self._policy.victims(layer, missing + more, keep):
                self.forget(victim)

    def _read(
        self, taken: Sequence[tuple[ExpertKey, int]], source: deque[int] | list[int], forms: Mapping[ExpertKey, Form],
        *, background: bool,
    ) -> list[Flight]:  # fmt: skip
        flights = [(key, slot, forms.get(key, "whole")) for key, slot in taken]
        try:
            if flights and self._settle_readers is not None:
                self._settle_readers()
            handles = self._reader.read_groups([self._group(*flight) for flight in flights], background=background)
        except BaseException:
            source.extend(slot for _, slot in taken)
            raise
        return [Flight(key, slot, handle, form) for (key, slot, form), handle in zip(flights, handles, strict=True)]

    def _group(self, key: ExpertKey, slot: int, form: Form) -> Group:
        base = slot * self.spec.stride
        return [
            (extent, self._slab.view(base + start, extent.window_nbytes)) for extent, start in self._parts(key, form)
        ]

    def _parts(self, key: ExpertKey, form: Form) -> list[tuple[Extent, int]]:
        """What is read, and where in a slot it lands."""
        if form == "whole":
            return self.spec.landing(self._layers[key.layer], key.expert)
        assert self._pack is not None
        planes = self._pack.experts[key]
        return list(zip(planes.high if form == "coarse" else planes.low, self.spec.starts, strict=True))

    def _expand(self, flight: Flight) -> None:
        """Makes coarse matrices of the high planes that have landed in a slot."""
        for matrix, high, blocks in self._landed(flight, flight.slot):
            expand(high.copy(), matrix.element, blocks)

    def _refine(self, flight: Flight) -> None:
        """Completes a resident expert by the low planes that have landed in another slot, which is free again."""
        for matrix, low, blocks in self._landed(flight, self._resident[flight.key]):
            refine(blocks, low, matrix.element)
        self._coarse.discard(flight.key)
        self._free.append(flight.slot)

    def _landed(self, flight: Flight, slot: int) -> Iterator[tuple[TensorInfo, Bytes, Bytes]]:
        """For each matrix: its planes where they have landed, and its blocks in `slot`; both [blocks, bytes]."""
        matrices = self._layers[flight.key.layer].experts[flight.key.expert]
        places = zip(matrices, self._parts(flight.key, flight.form), self._offsets[flight.key.layer], strict=True)
        for matrix, (extent, start), offset in places:
            count = matrix.nbytes // matrix.element.block_bytes
            planes = self._slab.view(flight.slot * self.spec.stride + start + extent.lead, extent.nbytes)
            blocks = self._slab.view(slot * self.spec.stride + offset, matrix.nbytes)
            yield matrix, _rows(planes, count), _rows(blocks, count)

    def _unpack(self, flight: Flight, stored: Stored) -> None:
        """Makes matrices of what has landed in a slot, in the same slot."""
        base, layer = flight.slot * self.spec.stride, self._layers[flight.key.layer]
        parts = [
            np.frombuffer(bytes(self._slab.view(base + start + extent.lead, extent.nbytes)), np.uint8)
            for extent, start in self._parts(flight.key, flight.form)
        ]
        matrices = unpack(stored, parts, layer.experts[flight.key.expert])
        for values, offset in zip(matrices, self._offsets[flight.key.layer], strict=True):
            self._slab.view(base + offset, values.nbytes)[:] = values.data

    def _settle(self, flight: Flight) -> None:
        """Moves the matrices of an expert to where kernels look for those of its layer, when they lie elsewhere."""
        layer = self._layers[flight.key.layer]
        if layer.stored is not None:
            self._unpack(flight, layer.stored)
            return
        base = self._slab.address + flight.slot * self.spec.stride
        matrices = layer.experts[flight.key.expert]
        for matrix, start, offset in zip(matrices, self.spec.starts, self._offsets[flight.key.layer], strict=True):
            found = start + matrix.extent.lead
            if found != offset:
                ctypes.memmove(base + offset, base + found, matrix.nbytes)


def _rows(view: memoryview, count: int) -> Bytes:
    return np.frombuffer(view, np.uint8).reshape(count, -1)
