import pytest

from offload.elements import KVTypes, element_type, kv_types
from offload.kernels.ggml.probe import measure_attention, measure_kernel
from offload.models.base import ModelConfig
from offload.units import MIB


def config(num_heads: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama", num_layers=1, hidden_size=64 * num_heads, num_heads=num_heads, num_kv_heads=num_heads,
        head_dim=64, intermediate_size=64, vocab_size=64, context_length=64, sliding_windows=(None,),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_K", "IQ2_XXS", "MXFP4"])
def test_every_element_type_has_a_speed(name: str) -> None:
    assert 1e7 < measure_kernel(element_type(name), 1, seconds=0.01, nbytes=4 * MIB) < 1e13


@pytest.mark.parametrize("types", [kv_types("f16"), kv_types("f32"), kv_types("q8_0", "q4_0")])
def test_attention_over_more_heads_takes_longer(types: KVTypes) -> None:
    few, many = (measure_attention(config(heads), types, 1, seconds=0.05) for heads in (2, 32))
    assert 0 < 2 * few < many
