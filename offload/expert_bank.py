"""Slots for experts: how large they are, and where in one an expert's matrices come to lie.

    slot     [ gate window | up window | down window ]     each as long as the matrix, and a page more
    window   [ lead | matrix | rest of the last page ]     direct reads land in place

Layers whose experts have the same shapes and types share a bank. Kernels want the matrices of a layer at the same place in
every slot: where the first expert's lie. Those of others lie there too when their size is a multiple of a page, and are
moved by less than a page after reading when it is not. Arithmetic only; no memory.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from offload.bank_plan import DEVICE_ALIGNMENT
from offload.blocks import Extent
from offload.models.base import ExpertLayer, Model
from offload.units import PAGE, align_up


@dataclass(frozen=True, slots=True, kw_only=True)
class BankSpec:
    """What a bank is for.

    Attributes:
        layers: those that share it. windows: bytes of the three windows of a slot.
    """

    layers: tuple[ExpertLayer, ...]
    windows: tuple[int, int, int]

    @property
    def stride(self) -> int:
        """Bytes of a slot."""
        return sum(self.windows)

    @property
    def num_experts(self) -> int:
        """Experts of all layers."""
        return sum(len(layer.experts) for layer in self.layers)

    @property
    def experts_per_layer(self) -> int:
        """Experts of each layer."""
        return len(self.layers[0].experts)

    @property
    def least_slots(self) -> int:
        """A token's experts of one layer, all at once."""
        return max(layer.num_used for layer in self.layers)

    @property
    def starts(self) -> tuple[int, int, int]:
        """Where the windows begin in a slot."""
        gate, up, _ = self.windows
        return 0, gate, gate + up

    def landing(self, layer: ExpertLayer, expert: int) -> list[tuple[Extent, int]]:
        """What is read of an expert, and where in its slot each part lands: page-aligned windows, one after the other.

        Where the file holds matrices as kernels want them, these are the windows that they stay in.
        """
        if layer.stored is None:
            extents = [matrix.extent for matrix in layer.experts[expert]]
            return list(zip(extents, self.starts, strict=True))
        parts, start = [], 0
        for extent in layer.stored.extents[expert]:
            parts.append((extent, start))
            start += align_up(extent.nbytes) + PAGE
        return parts

    def offsets(self, layer: ExpertLayer) -> tuple[int, int, int]:
        """Where the matrices of a layer lie in a slot."""
        gate, up, down = (
            start + matrix.extent.lead for start, matrix in zip(self.starts, layer.experts[0], strict=True)
        )
        return gate, up, down


def expert_banks(model: Model) -> tuple[BankSpec, ...]:
    """The banks that a model needs, in the order of its layers."""
    shared: dict[tuple[object, ...], list[ExpertLayer]] = defaultdict(list)
    for layer in model.experts.values():
        shared[_kind(layer)].append(layer)
    return tuple(BankSpec(layers=tuple(layers), windows=_windows(layers[0])) for layers in shared.values())


def expert_nbytes(layer: ExpertLayer) -> int:
    """Bytes of one expert's weights."""
    return sum(matrix.nbytes for matrix in layer.experts[0])


def device_slot(layer: ExpertLayer) -> tuple[tuple[int, int, int], int]:
    """Where the matrices of an expert lie in its place on a device, and the bytes of that."""
    gate, up, down = (align_up(matrix.nbytes, DEVICE_ALIGNMENT) for matrix in layer.experts[0])
    return (0, gate, gate + up), gate + up + down


def _windows(layer: ExpertLayer) -> tuple[int, int, int]:
    gate, up, down = (align_up(matrix.nbytes) + PAGE for matrix in layer.experts[0])
    if layer.stored is not None:  # what is read lands in the same slot, and has windows of its own
        landing = sum(align_up(extent.nbytes) + PAGE for extent in layer.stored.extents[0])
        down += max(0, landing - gate - up - down)
    return gate, up, down


def _kind(layer: ExpertLayer) -> tuple[object, ...]:
    shapes = tuple((matrix.element.name, matrix.shape) for matrix in layer.experts[0])
    stored = None if layer.stored is None else layer.stored.kind
    return (len(layer.experts), layer.num_used, layer.activation, layer.biases is None, shapes, stored)
