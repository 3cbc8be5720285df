"""Experts on a device: what its arena holds for good, copies of others that visit a few slots there, and the host's help.

    few tokens     all that are there by one product for each matrix; a slot for every token and rank says with whose
    many tokens    one expert after the other, for the tokens sent to it

What a token gets is the same whatever is held, in whichever slot, and whoever is computed beside it. Copies run ahead: those
of the next visitors are on their way while some are computed. The kernels wait for them, the host does not. Where the
device holds all experts of a layer, few tokens ask nothing of the host at all. Called from one thread.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload.bank_plan import DEVICE_ALIGNMENT
from offload.expert_bank import device_slot, expert_nbytes
from offload.expert_slots import HELD
from offload.kernels.batch import ExpertPlace, Floats, Ints
from offload.kernels.ggml.host_experts import HostExperts
from offload.kernels.torch.ops import TorchOps
from offload.kernels.torch.products import FEW_TOKENS, Products
from offload.models.base import Model
from offload.processors import Processors, for_device
from offload.sharing import Sharing
from offload.tiers.base import CancelToken, Handle
from offload.tiers.vram import DeviceTier

UNIT: Final = DEVICE_ALIGNMENT
"""Bytes that kernels count slots in: whatever lies in the arena has a number, held or visiting, of any bank."""
Lying = Mapping[int, int]
"""Experts of a layer, and where they lie in the arena."""


class Helper(NamedTuple):
    """The host beside the device: what computes experts there, and how fast both are."""

    experts: HostExperts
    processors: Processors


class TorchExperts:
    """See the module. Addresses are offsets into the arena of `tier`.

    Args:
        helper: the host as second processor; left out, what the device does not hold is copied to it.
    """

    def __init__(self, model: Model, tier: DeviceTier, products: Products, helper: Helper | None = None) -> None:
        self._layers = model.experts
        self._tier = tier
        self._products = products
        self._helper = helper
        self._offsets = {number: device_slot(layer)[0] for number, layer in model.experts.items()}
        self._places: dict[int, ExpertPlace] = {}
        self._held: dict[int, ExpertPlace] = {}
        self._complete: dict[int, Lying] = {}
        self._starts: dict[int, torch.Tensor] = {}
        self._visiting: Sequence[int] = ()
        self._last_copy: Handle | None = None
        self._cancel: CancelToken | None = None
        self._sharing: Sharing | None = None

    @staticmethod
    def workspace_nbytes(model: Model, tokens: int) -> int:
        """An upper bound of the temporaries on the device for micro-batches of so many tokens."""
        most = 0
        for layer in model.experts.values():
            width, hidden = layer.experts[0].gate.shape
            rows = max(tokens, min(tokens, FEW_TOKENS) * layer.num_used)
            decoded = max(4 * matrix.num_elements + matrix.nbytes for matrix in layer.experts[0])
            most = max(most, 4 * (tokens * layer.num_used * hidden + rows * (2 * hidden + 3 * width)) + 3 * decoded)
        return most

    def place(self, layer: int, place: ExpertPlace) -> None:
        """See `Backend.place_experts`: in host memory, from where they are copied or where they are computed."""
        self._places[layer] = place
        if self._helper is not None:
            self._helper.experts.place(layer, place)

    def place_vector(self, name: str, values: Floats) -> None:
        """See `Backend.place_vector`."""
        if self._helper is not None:
            self._helper.experts.place_vector(name, values)

    def place_held(self, layer: int, place: ExpertPlace) -> None:
        """Says where the arena holds experts of a layer for good."""
        self._held[layer] = place

    def place_visiting(self, addresses: Sequence[int]) -> None:
        """Says where copies go: slots that are large enough for every expert."""
        self._visiting = addresses

    def hold_layer(self, layer: int, slots: Sequence[int]) -> None:
        """All experts of a layer are held, in these slots: from now on passes compute them."""
        lying = {expert: self._address(layer, slot) for expert, slot in enumerate(slots)}
        self._complete[layer] = lying
        self._starts[layer] = torch.from_numpy(_units(lying.values())).to(self._tier.device)

    def set_sharing(self, sharing: Sharing) -> None:
        """See `TorchBackend.set_sharing`."""
        self._sharing = sharing

    def in_pass(self, layer: int) -> bool:
        """Whether `compute_held` computes a layer, and nobody need know its choice."""
        return layer in self._complete

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """See `Backend.set_cancel`."""
        self._cancel = cancel
        if self._helper is not None:
            self._helper.experts.set_cancel(cancel)

    def finish_copies(self) -> None:
        """Waits until no copy reads host memory any more: experts may then be read into it."""
        if self._last_copy is not None:
            self._last_copy.wait()
            self._last_copy = None

    # ---- computing

    def compute_held(self, ops: TorchOps, layer: int) -> None:
        """Computes what was chosen of a layer that the device holds as a whole."""
        experts = ops.routed[layer].experts
        if len(experts) > FEW_TOKENS:
            self._compute_each(ops, layer, experts.int().cpu().numpy(), self._complete[layer])
            return
        pairs = torch.arange(experts.numel(), device=self._tier.device)
        self._compute_together(ops, layer, pairs, self._starts[layer].index_select(0, experts.flatten()))

    def compute(self, ops: TorchOps, layer: int, chosen: Ints, slots: Mapping[int, int]) -> None:
        """Computes experts in `slots`, for the tokens whose choice they are."""
        for_host = self._share(layer, chosen, slots)
        x = ops.routed[layer].x.cpu().numpy() if for_host else None  # before there are kernels that wait for copies
        self._compute_here(ops, layer, chosen, {e: slot for e, slot in slots.items() if e not in for_host})
        if x is not None:  # beside what the device has been given
            self._compute_on_host(ops, layer, chosen, x, for_host)

    def _share(self, layer: int, chosen: Ints, slots: Mapping[int, int]) -> dict[int, int]:
        """The experts that the host had better compute itself."""
        slots = {expert: slot for expert, slot in slots.items() if slot < HELD}
        if self._helper is None or not slots or (self._sharing is not None and not self._sharing.experts):
            return {}
        nbytes = expert_nbytes(self._layers[layer])
        sent = np.bincount(chosen.reshape(-1).clip(0), minlength=max(slots) + 1)
        costs = [self._helper.processors.costs(nbytes, int(sent[expert])) for expert in slots]
        here = for_device(costs)
        return {expert: slot for index, (expert, slot) in enumerate(slots.items()) if index not in here}

    def _compute_on_host(self, ops: TorchOps, layer: int, chosen: Ints, x: Floats, slots: Mapping[int, int]) -> None:
        assert self._helper is not None
        returned = self._helper.experts.compute(layer, x, chosen, slots)
        pairs = _pairs(chosen, slots)
        ops.routed[layer].fill(self._sent(pairs), self._sent(returned.reshape(-1, returned.shape[-1])[pairs]))

    def _compute_here(self, ops: TorchOps, layer: int, chosen: Ints, slots: Mapping[int, int]) -> None:
        for lying in self._arrivals(layer, slots, together=len(chosen) <= FEW_TOKENS):
            if self._cancel is not None:
                self._cancel.raise_if_cancelled()
            if len(chosen) > FEW_TOKENS:
                self._compute_each(ops, layer, chosen, lying)
                continue
            pairs = _pairs(chosen, lying)
            starts = _units(lying[expert] for expert in chosen.reshape(-1)[pairs].tolist())
            self._compute_together(ops, layer, self._sent(pairs), self._sent(starts))

    def _compute_together(self, ops: TorchOps, layer: int, pairs: torch.Tensor, starts: torch.Tensor) -> None:
        """Pairs of token and rank, int64 [n] of token * num_used + rank; `starts`: where their experts lie, in units."""
        experts, routed = self._layers[layer], ops.routed[layer]
        numbers = routed.experts.flatten().index_select(0, pairs)
        x = routed.x if len(routed.x) == 1 else routed.x.index_select(0, pairs // experts.num_used)
        arena = self._tier.view(0, self._tier.capacity_bytes)
        products = [
            partial(
                self._products.expert_products, slots=starts, bank=arena, offset=offset, stride=UNIT,
                element=info.element, shape=_shape(info.shape), scales=ops.scales(info, numbers),
            )
            for offset, info in zip(self._offsets[layer], experts.experts[0], strict=True)
        ]  # fmt: skip
        routed.fill(pairs, ops.experts(experts, numbers, x, products))

    def _compute_each(self, ops: TorchOps, layer: int, chosen: Ints, lying: Lying) -> None:
        """One expert after the other."""
        experts, routed = self._layers[layer], ops.routed[layer]
        for expert, address in lying.items():
            if self._cancel is not None:
                self._cancel.raise_if_cancelled()
            pairs = self._sent(_pairs(chosen, (expert,)))
            if not len(pairs):
                continue
            products = [
                partial(
                    self._products.product, raw=self._tier.view(address + offset, info.nbytes), element=info.element,
                    shape=_shape(info.shape), scales=ops.scales(info),
                )
                for offset, info in zip(self._offsets[layer], experts.experts[expert], strict=True)
            ]  # fmt: skip
            x = routed.x.index_select(0, pairs // experts.num_used)
            routed.fill(pairs, ops.experts(experts, expert, x, products))

    # ---- visitors

    def _arrivals(self, layer: int, slots: Mapping[int, int], *, together: bool) -> Iterator[Lying]:
        """Experts where kernels find them, the held ones first. Before the next are asked for, kernels of these are queued.

        Visitors come by halves of their slots, so that one is copied while the other is computed, or one by one.
        """
        most = max(1, len(self._visiting) // 2) if together else 1
        visitors = [(expert, slot) for expert, slot in slots.items() if slot < HELD]
        waiting = deque(visitors[first : first + most] for first in range(0, len(visitors), most))
        free, flying = deque(self._visiting), deque[tuple[Handle, Lying]]()

        def start() -> None:
            while waiting and len(waiting[0]) <= len(free):
                flying.append(self._copy(layer, [(*visitor, free.popleft()) for visitor in waiting.popleft()]))

        start()
        held = {expert: self._address(layer, slot) for expert, slot in slots.items() if slot >= HELD}
        if held:
            yield held
        while flying:
            handle, lying = flying.popleft()
            self._tier.order(handle)
            yield lying
            free.extend(lying.values())
            start()
        assert not waiting, "the plan has slots for visitors wherever not all experts are held"

    def _copy(self, layer: int, visitors: Sequence[tuple[int, int, int]]) -> tuple[Handle, Lying]:
        """Starts copying experts, each given with its slot in host memory and where it goes."""
        place, matrices = self._places[layer], self._layers[layer].experts
        parts = [
            (_host_bytes(place.address + slot * place.stride + start, info.nbytes), address + offset)
            for expert, slot, address in visitors
            for info, start, offset in zip(matrices[expert], place.offsets, self._offsets[layer], strict=True)
        ]
        self._last_copy = self._tier.copy_parts(parts)
        return self._last_copy, {expert: address for expert, _, address in visitors}

    def _address(self, layer: int, slot: int) -> int:
        """Where the arena has what it holds under this slot."""
        return self._held[layer].address + (slot - HELD) * self._held[layer].stride

    def _sent(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """The array on the device. Pageable memory is read before this returns, so nobody need wait."""
        return torch.from_numpy(array).to(self._tier.device, non_blocking=True)


def _pairs(chosen: Ints, experts: Iterable[int]) -> npt.NDArray[np.int64]:
    """Where in the choice, token * num_used + rank, any of these experts are."""
    return np.flatnonzero(np.isin(chosen.reshape(-1), list(experts)))


def _units(addresses: Iterable[int]) -> Ints:
    units = [divmod(address, UNIT) for address in addresses]
    assert not any(rest for _, rest in units), "matrices begin where a device reads at once"
    return np.array([number for number, _ in units], np.int32)


def _shape(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def _host_bytes(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
