"""The feed-forward of a layer with experts, from a checkpoint's tensors: one for each role, or one for each expert.

    blk.3.ffn_gate_exps.weight     [num_experts, width, hidden_size]          GGUF; likewise ffn_up_exps, ffn_down_exps
    blk.3.ffn_gate_up_exps.weight  [num_experts, 2 * width, hidden_size]      gate, then up, of every expert
    blk.3.experts.gate_up_proj ..                                             gpt-oss, see `models.stored_experts`
    blk.3.ffn_gate.7.weight        [width, hidden_size]                       most Hugging Face checkpoints, old GGUFs

Whatever the file does, an expert is three matrices that lie somewhere in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload.kernels.ops import Activation, Routing
from offload.models.assembly import Assembly
from offload.models.base import ExpertBiases, ExpertLayer, ExpertMatrices, Stored
from offload.models.checkpoint.base import TensorInfo
from offload.models.layers import Norm, Projection
from offload.models.mixture import MixStage, RouterStage, SharedExpert
from offload.models.stored_experts import is_stored, stored_biases, stored_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The shared expert: its width, and whether its output is weighted by a gate."""

    width: int
    gated: bool = False


def add_mixture(
    parts: Assembly,
    routing: Routing,
    *,
    width: int,
    activation: Activation,
    shared: Shared | None = None,
    norm: str = "ffn_norm",
    residual_multiplier: float | None = None,
) -> None:
    """Appends router and experts of a layer.

    Args:
        routing: names are taken without the layer's prefix.
        width: of each expert.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    layer, prefix = routing.layer, f"blk.{routing.layer}."
    router = parts.projection(f"{prefix}{routing.router}", routing.num_experts, parts.shape.hidden_size)
    selection = routing.selection_bias
    routing = replace(
        routing,
        router=router.weight,
        bias=router.bias,
        selection_bias=None if selection is None else parts.vector(f"{prefix}{selection}", routing.num_experts),
    )
    sizes = (parts, prefix, routing.num_experts, width)
    stored: Stored | None = None
    biases: ExpertBiases | None
    if is_stored(parts, prefix):
        (matrices, stored), biases = stored_experts(*sizes), stored_biases(*sizes)
    else:
        matrices, biases = _matrices(*sizes), _biases(*sizes)
    experts = ExpertLayer(
        layer=layer,
        num_used=routing.num_used,
        activation=activation,
        experts=matrices,
        biases=biases,
        stored=stored,
    )
    normed = parts.norm(f"{prefix}{norm}.weight")
    parts.mixture(
        experts,
        RouterStage(name=f"{prefix}router", norm=normed, routing=routing),
        _mix(parts, prefix, layer, normed, shared, activation, residual_multiplier),
    )


def _mix(
    parts: Assembly, prefix: str, layer: int, norm: Norm, shared: Shared | None, activation: Activation,
    residual_multiplier: float | None,
) -> MixStage:  # fmt: skip
    expert = None
    if shared is not None:
        inner = parts.gated(prefix, shared.width, activation, suffix="_shexp")
        gate = Projection(parts.single_row(f"{prefix}ffn_gate_inp_shexp.weight")) if shared.gated else None
        expert = SharedExpert(inner=inner, gate=gate)
    return MixStage(name=f"{prefix}mix", layer=layer, norm=norm, shared=expert, residual_multiplier=residual_multiplier)


def _matrices(parts: Assembly, prefix: str, count: int, width: int) -> tuple[ExpertMatrices, ...]:
    hidden = parts.shape.hidden_size
    if f"{prefix}ffn_gate_up_exps.weight" in parts:
        both = _stacked(parts, f"{prefix}ffn_gate_up_exps.weight", (count, 2 * width, hidden))
        gates, ups = [one.rows(0, width) for one in both], [one.rows(width, 2 * width) for one in both]
    else:
        gates, ups = (_role(parts, prefix, role, (count, width, hidden)) for role in ("ffn_gate", "ffn_up"))
    downs = _role(parts, prefix, "ffn_down", (count, hidden, width))
    return tuple(ExpertMatrices(*three) for three in zip(gates, ups, downs, strict=True))


def _biases(parts: Assembly, prefix: str, count: int, width: int) -> ExpertBiases | None:
    if f"{prefix}ffn_down_exps.bias" not in parts:
        return None
    gate, up = (parts.vector(f"{prefix}{role}_exps.bias", width, each=count) for role in ("ffn_gate", "ffn_up"))
    return ExpertBiases(gate, up, parts.vector(f"{prefix}ffn_down_exps.bias", parts.shape.hidden_size, each=count))


def _role(parts: Assembly, prefix: str, role: str, shape: tuple[int, int, int]) -> list[TensorInfo]:
    """The matrices of one role, however they are stored."""
    if f"{prefix}{role}.0.weight" not in parts:
        return _stacked(parts, f"{prefix}{role}_exps.weight", shape)
    names = [f"{prefix}{role}.{index}.weight" for index in range(shape[0])]
    return parts.matrices(names, shape[1:], f"{prefix}{role}_exps.weight_scale")


def _stacked(parts: Assembly, name: str, shape: tuple[int, int, int]) -> list[TensorInfo]:
    tensor = parts.tensor(name, 3)
    parts.check(tensor, name, shape)
    return [tensor.member(index) for index in range(shape[0])]
