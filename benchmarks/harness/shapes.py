"""Shapes of the synthetic models: those of real ones, and so are their bytes per token and the sizes of their matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple


class Tensor(NamedTuple):
    """A tensor under both of its names; `shape` is outermost first. Vectors (norms) have one dimension."""

    gguf: str
    huggingface: str
    shape: tuple[int, ...]


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

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    def tensors(self, vocab_size: int) -> Iterator[Tensor]:
        """Every tensor in the order of the forward pass."""
        yield Tensor("token_embd.weight", "model.embed_tokens.weight", (vocab_size, self.hidden))
        for layer in range(self.num_layers):
            for gguf, huggingface, shape in self._layer():
                yield Tensor(f"blk.{layer}.{gguf}.weight", f"model.layers.{layer}.{huggingface}.weight", shape)
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


PRESETS: Final = {
    # Llama 3 8B with the demo model's vocabulary of 49,152; Q4_K throughout: 4.15 GB
    "dense-8b": Shape(
        num_layers=32, hidden=4096, intermediate=14336, num_heads=32, num_kv_heads=8, tied=False, element="Q4_K"
    ),
    # Llama 3.2 1B with the same vocabulary; bfloat16: 2.15 GB
    "llama-1b": Shape(
        num_layers=16, hidden=2048, intermediate=8192, num_heads=32, num_kv_heads=8, tied=True, element="BF16"
    ),
}
TINY: Final = {
    "dense-8b": Shape(
        num_layers=3, hidden=256, intermediate=512, num_heads=4, num_kv_heads=2, tied=False, element="Q4_K"
    ),
    "llama-1b": Shape(
        num_layers=3, hidden=128, intermediate=256, num_heads=4, num_kv_heads=2, tied=True, element="BF16"
    ),
}
