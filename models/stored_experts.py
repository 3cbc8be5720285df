"""gpt-oss's experts as its safetensors hold them: gate and up alternate, matrices are transposed, or blocks of four bits.

    experts.gate_up_proj [num_experts, hidden, 2 * width], experts.down_proj [num_experts, width, hidden]
    experts.gate_up_proj_blocks [num_experts, 2 * width, hidden / 32, 16], _scales [.., hidden / 32]; likewise down_proj

What is read of an expert is described here, and becomes matrices on arrival (`offload.unpacking`).
"""

from __future__ import annotations

from typing import Final

from offload.blocks import Extent
from offload.elements import BY_NAME, ElementType
from offload.models.assembly import Assembly
from offload.models.base import ExpertBiases, ExpertMatrices, Stored
from offload.models.checkpoint.base import TensorInfo

_BLOCK: Final = 32
_BLOCK_BYTES: Final = 16
_ROLES: Final = ("gate_up_proj", "down_proj")


def is_stored(parts: Assembly, prefix: str) -> bool:
    """Whether a layer's experts lie like this."""
    return any(f"{prefix}experts.down_proj{suffix}" in parts for suffix in ("", "_blocks"))


def stored_experts(parts: Assembly, prefix: str, count: int, width: int) -> tuple[tuple[ExpertMatrices, ...], Stored]:
    """The matrices that will be, and what is read for them.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    hidden = parts.shape.hidden_size
    sizes = dict(zip(_ROLES, ((2 * width, hidden), (hidden, width)), strict=True))
    if f"{prefix}experts.down_proj_blocks" in parts:
        tensors = [
            _raw(parts, f"{prefix}experts.{role}_{kind}", (count, rows, columns // _BLOCK, *tail))
            for role, (rows, columns) in sizes.items()
            for kind, tail in (("blocks", (_BLOCK_BYTES,)), ("scales", ()))
        ]
        stored = Stored("mxfp4_blocks", _by_expert(tensors, count))
        element = BY_NAME["MXFP4"]
    else:
        tensors = [parts.tensor(f"{prefix}experts.{role}", 3) for role in _ROLES]
        for tensor, (role, (rows, columns)) in zip(tensors, sizes.items(), strict=True):
            parts.check(tensor, f"{prefix}experts.{role}", (count, columns, rows))
            if tensor.element != tensors[0].element or tensor.element.is_quantized:
                raise parts.error(f"{prefix}experts.{role}", f"is {tensor.element}")
        stored = Stored("transposed", _by_expert(tensors, count))
        element = tensors[0].element
    path = tensors[0]
    gate = _virtual(path, element, (width, hidden))
    matrices = ExpertMatrices(gate, gate, _virtual(path, element, (hidden, width)))
    return (matrices,) * count, stored


def stored_biases(parts: Assembly, prefix: str, count: int, width: int) -> ExpertBiases:
    """Gate's and up's alternate too."""
    both = f"{prefix}experts.gate_up_proj_bias"
    gate, up = (
        parts.vector(both, 2 * width, each=count, start=start, step=2, called=f"{both}.{role}")
        for start, role in enumerate(("gate", "up"))
    )
    return ExpertBiases(gate, up, parts.vector(f"{prefix}experts.down_proj_bias", parts.shape.hidden_size, each=count))


def _raw(parts: Assembly, name: str, shape: tuple[int, ...]) -> TensorInfo:
    tensor = parts.raw_tensor(name)
    parts.check(tensor, name, shape)
    return tensor


def _by_expert(tensors: list[TensorInfo], count: int) -> tuple[tuple[Extent, ...], ...]:
    def extent(tensor: TensorInfo, expert: int) -> Extent:
        each = tensor.nbytes // count
        return Extent(path=tensor.extent.path, offset=tensor.extent.offset + expert * each, nbytes=each)

    return tuple(tuple(extent(tensor, expert) for tensor in tensors) for expert in range(count))


def _virtual(origin: TensorInfo, element: ElementType, shape: tuple[int, int]) -> TensorInfo:
    """A matrix that lies nowhere yet: of its extent only the length means anything."""
    nbytes = shape[0] * element.row_bytes(shape[1])
    extent = Extent(path=origin.extent.path, offset=0, nbytes=nbytes)
    return TensorInfo(name=origin.name, element=element, shape=shape, extent=extent)
