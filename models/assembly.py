"""Puts a `Model` together from a checkpoint's tensors while an architecture walks through its layers.

Every tensor that a stage names is looked up here, and its shape compared with what the sizes of the model demand. Knows
GGUF's names and no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from offload.elements import F8_E4M3, INTEGER_OR_DOUBLE
from offload.errors import CheckpointError, UnsupportedError
from offload.kernels.ops import Activation, Attention, Rope
from offload.models.base import ExpertLayer, Model, ModelConfig, Stage, Vector
from offload.models.checkpoint.base import Checkpoint, Scales, TensorInfo
from offload.models.hyperparameters import Shape
from offload.models.layers import AttentionStage, FeedForward, FeedForwardStage, HeadPart, Norm, Projection
from offload.models.parts import head_parts, movable_parts
from offload.models.quantization import find_scales


class Assembly:
    """The parts of a model, collected in data-flow order.

    Args:
        checkpoint: where the tensors are.
        shape: the sizes that tensors are checked against.
        rename: GGUF's name of a Hugging Face tensor; not asked for GGUF files.
        norm_offset: added to every norm weight (1 where a family's files hold the weight less one).
    """

    def __init__(
        self, checkpoint: Checkpoint, shape: Shape, rename: Callable[[str], str], *, norm_offset: float = 0.0
    ) -> None:
        self.checkpoint = checkpoint
        self.shape = shape
        self._norm_offset = norm_offset
        self._tensors: dict[str, TensorInfo] = {}
        self._matrices: dict[str, TensorInfo] = {}
        self._vectors: dict[str, Vector] = {}
        self._experts: dict[int, ExpertLayer] = {}
        self._stages: list[Stage] = []
        for name, tensor in checkpoint.tensors.items():
            canonical = name if checkpoint.format == "gguf" else rename(name)
            if canonical in self._tensors:
                raise self.error(canonical, f"is stored twice, as {self._tensors[canonical].name} and {name}")
            self._tensors[canonical] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def attention(
        self,
        layer: int,
        *,
        rope: Rope | None,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        scale_query_first: bool = False,
        qkv_bias: bool = False,
        qk_norm: Literal["heads", "whole"] | None = None,
        post_norm: bool = False,
        residual_multiplier: float | None = None,
    ) -> None:
        """Appends the attention of a layer.

        Args:
            qkv_bias: demands biases; where not demanded they are used if present.
            qk_norm: query and key are normed, each head by itself or all at once.
            sinks: every head has a score that carries no value.
        """
        shape, prefix = self.shape, f"blk.{layer}."
        stage = AttentionStage(
            name=f"{prefix}attention",
            layer=layer,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            norm=self.norm(f"{prefix}attn_norm.weight"),
            qkv=self._qkv(prefix, qkv_bias),
            output=self.projection(f"{prefix}attn_output", shape.hidden_size, shape.num_heads * shape.head_dim),
            attention=Attention(
                layer=layer,
                scale=1.0 if scale_query_first else scale,
                window=window,
                softcap=softcap,
                sinks=self.vector(f"{prefix}attn_sinks.weight", shape.num_heads) if sinks else None,
            ),
            rope=rope,
            query_norm=self._head_norm(f"{prefix}attn_q_norm.weight", shape.num_heads, qk_norm),
            key_norm=self._head_norm(f"{prefix}attn_k_norm.weight", shape.num_kv_heads, qk_norm),
            norms_whole=qk_norm == "whole",
            query_scale=scale if scale_query_first else None,
            post_norm=self.norm(f"{prefix}post_attention_norm.weight") if post_norm else None,
            residual_multiplier=residual_multiplier,
            is_last=layer == shape.num_layers - 1,
        )
        self._stages.append(stage)

    def feed_forward(
        self,
        layer: int,
        *,
        activation: Activation = "silu",
        fused: bool = False,
        norm: str = "ffn_norm",
        post_norm: bool = False,
        residual_multiplier: float | None = None,
    ) -> None:
        """Appends the feed-forward of a layer. `fused`: gate and up are the rows of `ffn_up`, in this order."""
        prefix, width = f"blk.{layer}.", self.shape.intermediate_size
        stage = FeedForwardStage(
            name=f"{prefix}feed_forward",
            layer=layer,
            norm=self.norm(f"{prefix}{norm}.weight"),
            inner=self.gated(prefix, width, activation, fused=fused),
            post_norm=self.norm(f"{prefix}post_ffw_norm.weight") if post_norm else None,
            residual_multiplier=residual_multiplier,
        )
        self._stages.append(stage)

    def gated(
        self, prefix: str, width: int, activation: Activation, *, suffix: str = "", fused: bool = False
    ) -> FeedForward:
        """The gated feed-forward whose matrices are `{prefix}ffn_gate{suffix}` and so on."""
        hidden = self.shape.hidden_size
        gate_up = (
            (self.projection(f"{prefix}ffn_up{suffix}", 2 * width, hidden),)
            if fused
            else tuple(self.projection(f"{prefix}{name}{suffix}", width, hidden) for name in ("ffn_gate", "ffn_up"))
        )
        down = self.projection(f"{prefix}ffn_down{suffix}", hidden, width)
        return FeedForward(intermediate_size=width, gate_up=gate_up, down=down, activation=activation)

    def mixture(self, experts: ExpertLayer, *stages: Stage) -> None:
        """Appends the two stages of a layer with experts; see `models.expert_assembly`."""
        self._experts[experts.layer] = experts
        self._stages += stages

    def finish(
        self,
        *,
        tied: bool,
        windows: tuple[int | None, ...],
        embedding_scale: float = 1.0,
        logit_scale: float | None = None,
        softcap: float | None = None,
        value_dim: int | None = None,
        shares_values: bool = False,
    ) -> Model:
        """Appends the head and closes the model. `tied`: the head's matrix is the token table."""
        shape = self.shape
        embedding = self.tensor("token_embd.weight", 2)
        vocab_size = shape.vocab_size or embedding.shape[0]
        self.check(embedding, "token_embd.weight", (vocab_size, shape.hidden_size))
        if "output.bias" in self:
            raise UnsupportedError(f"{self.checkpoint.path}: output.bias: a head with a bias is not supported")
        head = embedding if tied else self.tensor("output.weight", 2)
        self.check(head, "output.weight", (vocab_size, shape.hidden_size))
        parts = head_parts(head)
        norm = self.norm("output_norm.weight")
        for index, (name, part) in enumerate(parts.items()):
            self._matrices[name] = part
            self._stages.append(
                HeadPart(name=f"head.{index}", norm=norm, output=name, logit_scale=logit_scale, softcap=softcap)
            )
        config = ModelConfig(
            architecture=self.checkpoint.architecture,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            vocab_size=vocab_size,
            context_length=shape.context_length,
            sliding_windows=windows,
            embedding_scale=embedding_scale,
            value_dim=value_dim,
            shares_values=shares_values,
        )
        return Model(
            config=config,
            stages=tuple(self._stages),
            matrices=self._matrices,
            parts={name: movable_parts(matrix) for name, matrix in self._matrices.items()},
            vectors=self._vectors,
            embedding=embedding,
            head_parts=len(parts),
            experts=self._experts,
        )

    def norm(self, name: str, length: int | None = None) -> Norm:
        """An RMS norm over `length` features, by default the hidden size."""
        self.vector(name, self.shape.hidden_size if length is None else length, self._norm_offset)
        return Norm(name, self.shape.eps)

    def _head_norm(self, name: str, num_heads: int, kind: Literal["heads", "whole"] | None) -> Norm | None:
        if kind is None:
            return None
        return self.norm(name, self.shape.head_dim * (num_heads if kind == "whole" else 1))

    def vector(
        self, name: str, length: int, offset: float = 0.0, *, each: int | None = None, start: int = 0, step: int = 1,
        called: str | None = None,
    ) -> str:  # fmt: skip
        """Registers a stored vector, or one for `each` of so many experts, and returns its name.

        Args:
            start, step: which elements of the stored one it has. called: another name for it.
        """
        tensor = self.tensor(name, 1 if each is None else 2)
        self.check(tensor, name, (length,) if each is None else (each, length))
        if tensor.element.is_quantized:
            raise UnsupportedError(
                f"{self.checkpoint.path}: {name}: a vector of type {tensor.element} is not supported"
            )
        self._vectors[called or name] = Vector(tensor=tensor, offset=offset, start=start, step=step)
        return called or name

    def constant(self, name: str, values: tuple[float, ...]) -> str:
        """Registers a computed vector and returns its name."""
        self._vectors[name] = Vector(values=values)
        return name

    def _qkv(self, prefix: str, bias: bool) -> tuple[Projection, ...]:
        hidden, query, key = (
            self.shape.hidden_size,
            self.shape.num_heads * self.shape.head_dim,
            self.shape.num_kv_heads * self.shape.head_dim,
        )
        if f"{prefix}attn_qkv.weight" in self:
            if f"{prefix}attn_q.bias" in self:
                raise UnsupportedError(f"{self.checkpoint.path}: {prefix}attn_q.bias beside a fused attn_qkv.weight")
            return (self.projection(f"{prefix}attn_qkv", query + 2 * key, hidden, bias),)
        rows = {"attn_q": query, "attn_k": key, "attn_v": key}
        return tuple(self.projection(prefix + name, size, hidden, bias) for name, size in rows.items())

    def projection(self, name: str, rows: int, columns: int, bias: bool = False) -> Projection:
        """Registers the matrix `{name}.weight`, and `{name}.bias` where it is demanded or there."""
        weight, bias_name = f"{name}.weight", f"{name}.bias"
        (self._matrices[weight],) = self.matrices((weight,), (rows, columns), f"{weight}_scale")
        return Projection(weight, self.vector(bias_name, rows) if bias or bias_name in self else None)

    def matrices(self, names: Sequence[str], shape: tuple[int, int], scales: str) -> list[TensorInfo]:
        """Stored matrices of one shape and type. Those in FP8 have scales, which become the vector `scales`."""
        tensors = [self.raw_tensor(name) for name in names]
        is_scaled = tensors[0].element == F8_E4M3
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.element != tensors[0].element:
                raise self.error(name, f"is {tensor.element}; {names[0]} is {tensors[0].element}")
            self.check(tensor if is_scaled else self.tensor(name, 2), name, shape)
        if not is_scaled:
            return tensors
        found = [find_scales(self.checkpoint, self._tensors, name, shape) for name in names]
        for name, one in zip(names, found, strict=True):
            if one[1:] != found[0][1:]:
                raise self.error(name, f"has scales of {one.rows} by {one.columns} elements; {names[0]} of others")
        self._vectors[scales] = Vector(stacked=tuple(one.tensor for one in found))
        return [
            replace(tensor, scales=Scales(scales, index, one.rows, one.columns))
            for index, (tensor, one) in enumerate(zip(tensors, found, strict=True))
        ]

    def projection_heads(self, name: str, rows: int, columns: int) -> str:
        """Registers a matrix [rows, columns] for each head, and returns its name."""
        tensor = self.tensor(name, 3)
        self.check(tensor, name, (self.shape.num_heads, rows, columns))
        self._matrices[name] = tensor
        return name

    def add(self, stage: Stage) -> None:
        """Appends a stage that a family makes itself."""
        self._stages.append(stage)

    def single_row(self, name: str) -> str:
        """Registers a matrix of one row, which a file may store as a vector, and returns its name."""
        rank = len(self._tensors[name].shape) if name in self else 2
        tensor = self.tensor(name, min(rank, 2))
        shape = (1, self.shape.hidden_size)
        self.check(tensor, name, shape[-rank:])
        self._matrices[name] = replace(tensor, shape=shape)
        return name

    def raw_tensor(self, name: str) -> TensorInfo:
        """The stored tensor `name`, of whatever type."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise self.error(name, f"is missing; {self.checkpoint.architecture} needs it")
        return tensor

    def tensor(self, name: str, rank: int) -> TensorInfo:
        """The stored tensor `name`, which must have `rank` dimensions."""
        tensor = self.raw_tensor(name)
        if tensor.element == F8_E4M3:
            raise UnsupportedError(
                f"{self.checkpoint.path}: {name}: only linear layers and experts with matrices of their own are supported "
                f"in {F8_E4M3}; use a bfloat16 version of the model, or a GGUF"
            )
        if tensor.element.name in INTEGER_OR_DOUBLE:
            raise UnsupportedError(
                f"{self.checkpoint.path}: {name}: weights of type {tensor.element} are not supported"
            )
        if len(tensor.shape) != rank:
            raise self.error(name, f"has shape {tensor.shape}; expected {rank} dimension{'s' * (rank > 1)}")
        return tensor

    def check(self, tensor: TensorInfo, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError where the tensor has another shape."""
        if tensor.shape != shape:
            raise self.error(name, f"has shape {tensor.shape}; the model's sizes demand {shape}")

    def error(self, name: str, problem: str) -> CheckpointError:
        """What to raise about a tensor."""
        path = str(self.checkpoint.path)
        return CheckpointError(f"{path}: tensor {name} {problem}", path=path, tensor=name)
