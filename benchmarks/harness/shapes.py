"""Shapes of the synthetic models: those of real ones, and so are their bytes per token and the sizes of their matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple


class Tensor(NamedTuple):
    """A tensor under both of its names; `shape` is outermost first. Vectors (norms) have one dimension.

    `fill` is the value of a vector's elements; `is_router` marks a matrix that files keep in F32.
    """

    gguf: str
    huggingface: str
    shape: tuple[int, ...]
    fill: float = 1.0
    is_router: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A llama-style dense decoder. `element` is the type of every matrix, embedding and output included."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    tied: bool
    element: str
    context: int = 8192
    theta: float = 500000.0
    epsilon: float = 1e-5

    architecture: ClassVar[str] = "llama"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    def tensors(self, vocab_size: int) -> Iterator[Tensor]:
        """Every tensor in the order of the forward pass."""
        yield Tensor("token_embd.weight", "model.embed_tokens.weight", (vocab_size, self.hidden))
        for layer in range(self.num_layers):
            for tensor in self._layer():
                names = f"blk.{layer}.{tensor.gguf}.weight", f"model.layers.{layer}.{tensor.huggingface}.weight"
                yield tensor._replace(gguf=names[0], huggingface=names[1])
        yield Tensor("output_norm.weight", "model.norm.weight", (self.hidden,))
        if not self.tied:
            yield Tensor("output.weight", "lm_head.weight", (vocab_size, self.hidden))

    def _layer(self) -> Iterator[Tensor]:
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield Tensor("attn_norm", "input_layernorm", (self.hidden,))
        yield Tensor("attn_q", "self_attn.q_proj", (wide, self.hidden))
        yield Tensor("attn_k", "self_attn.k_proj", (narrow, self.hidden))
        yield Tensor("attn_v", "self_attn.v_proj", (narrow, self.hidden))
        yield Tensor("attn_output", "self_attn.o_proj", (self.hidden, wide))
        yield Tensor("ffn_norm", "post_attention_layernorm", (self.hidden,))
        yield Tensor("ffn_gate", "mlp.gate_proj", (self.intermediate, self.hidden))
        yield Tensor("ffn_up", "mlp.up_proj", (self.intermediate, self.hidden))
        yield Tensor("ffn_down", "mlp.down_proj", (self.hidden, self.intermediate))


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureShape(Shape):
    """Qwen 3 with experts. `intermediate` is the width of each; heads have 128 features, as its own have.

    The norm before attention is small: with all norms at one, the hidden states of different tokens nearly coincide in deep
    layers, and a handful of experts serves them all.
    """

    num_experts: int
    num_used: int
    attention_norm: float = 0.02
    architecture: ClassVar[str] = "qwen3moe"

    @property
    def head_dim(self) -> int:
        return min(128, self.hidden // 2)

    def _layer(self) -> Iterator[Tensor]:
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield Tensor("attn_norm", "input_layernorm", (self.hidden,), fill=self.attention_norm)
        yield Tensor("attn_q", "self_attn.q_proj", (wide, self.hidden))
        yield Tensor("attn_k", "self_attn.k_proj", (narrow, self.hidden))
        yield Tensor("attn_v", "self_attn.v_proj", (narrow, self.hidden))
        yield Tensor("attn_q_norm", "self_attn.q_norm", (self.head_dim,))
        yield Tensor("attn_k_norm", "self_attn.k_norm", (self.head_dim,))
        yield Tensor("attn_output", "self_attn.o_proj", (self.hidden, wide))
        yield Tensor("ffn_norm", "post_attention_layernorm", (self.hidden,))
        yield Tensor("ffn_gate_inp", "mlp.gate", (self.num_experts, self.hidden), is_router=True)
        yield Tensor("ffn_gate_exps", "mlp.experts.gate_proj", (self.num_experts, self.intermediate, self.hidden))
        yield Tensor("ffn_up_exps", "mlp.experts.up_proj", (self.num_experts, self.intermediate, self.hidden))
        yield Tensor("ffn_down_exps", "mlp.experts.down_proj", (self.num_experts, self.hidden, self.intermediate))


PRESETS: Final = {
    # Llama 3 8B with the demo model's vocabulary of 49,152; Q4_K throughout: 4.15 GB
    "dense-8b": Shape(
        num_layers=32, hidden=4096, intermediate=14336, num_heads=32, num_kv_heads=8, tied=False, element="Q4_K"
    ),
    # Llama 3.2 1B with the same vocabulary; bfloat16: 2.15 GB
    "llama-1b": Shape(
        num_layers=16, hidden=2048, intermediate=8192, num_heads=32, num_kv_heads=8, tied=True, element="BF16"
    ),
    # half of the layers of Qwen 3 30B-A3B with the same vocabulary; Q4_K: 8.55 GB
    "moe-16b": MixtureShape(
        num_layers=24, hidden=2048, intermediate=768, num_heads=32, num_kv_heads=4, tied=False, element="Q4_K",
        num_experts=128, num_used=8, theta=1e6, epsilon=1e-6,
    ),
}  # fmt: skip
TINY: Final = {
    "dense-8b": Shape(
        num_layers=3, hidden=256, intermediate=512, num_heads=4, num_kv_heads=2, tied=False, element="Q4_K"
    ),
    "llama-1b": Shape(
        num_layers=3, hidden=128, intermediate=256, num_heads=4, num_kv_heads=2, tied=True, element="BF16"
    ),
    "moe-16b": MixtureShape(
        num_layers=3, hidden=256, intermediate=256, num_heads=4, num_kv_heads=2, tied=False, element="Q4_K",
        num_experts=16, num_used=4, theta=1e6, epsilon=1e-6,
    ),
}  # fmt: skip
