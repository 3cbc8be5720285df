"""The random models of `support.checkpoints` as GGUF files, written as llama.cpp's converter would write them."""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from support.checkpoints import tiny_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_ARCHITECTURES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
_GGUF_NAMES = {"granitemoe": "GRANITE_MOE", "glm4moe": "GLM4_MOE", "gpt-oss": "GPT_OSS"}  # of gguf's own constants
_PERMUTED = ("llama", "smollm3", "granite", "granitemoe")  # rotated pairs are stored as neighbours
SIZES_FOR_K_QUANTS = {"hidden_size": 256, "intermediate_size": 512}


def gguf_checkpoint(family: str, folder: Path, element: str = "F32", **overrides: Any) -> Path:
    """Writes a random model of `family` into `folder` and returns the file.

    Matrices are stored as `element`, all else as F32. K and IQ types need rows of 256: pass `**SIZES_FOR_K_QUANTS`.
    """
    model = tiny_model(family, **overrides)
    architecture = _ARCHITECTURES.get(family, family)
    path = folder / f"{family}-{element}.gguf"
    writer = GGUFWriter(path, architecture)
    _write_metadata(writer, architecture, model.config)
    _write_vocabulary(writer, model.config.vocab_size)
    constant = _GGUF_NAMES.get(architecture, architecture.upper())
    names = gguf.get_tensor_name_map(getattr(MODEL_ARCH, constant), model.config.num_hidden_layers)
    for name, tensor in _split_heads(_stacked(_stored(model)), model.config).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        converted = _convert(architecture, model.config, name, tensor).numpy()
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert renamed is not None, name
        kept = converted.ndim == 1 or renamed.endswith("bias") or "ffn_gate_inp" in renamed
        _add_tensor(writer, renamed, converted, "F32" if kept else element)
    _write_rope_factors(writer, model.config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors by the names that its files have; in memory, experts lie in fewer."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices that there is one of for each expert, as one tensor, as the converter calls it."""
    groups: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    result = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.([0-9]+)(\..*)", name)
        if match is not None:
            groups[match[1] + match[3]][int(match[2])] = tensor
        elif ".experts.gate_up_proj" in name:  # gpt-oss: gate and up alternate, and matrices are transposed
            suffix = "bias" if name.endswith("bias") else "weight"
            for role, values in (("gate", tensor[..., ::2]), ("up", tensor[..., 1::2])):
                prefix = name.split("gate_up_proj")[0]
                result[f"{prefix}{role}_proj.{suffix}"] = values if suffix == "bias" else values.mT.contiguous()
        elif name.endswith(".experts.down_proj_bias"):
            result[name.replace("_bias", ".bias")] = tensor
        elif name.endswith(".experts.down_proj"):
            result[f"{name}.weight"] = tensor.mT.contiguous()
        elif name.endswith("block_sparse_moe.input_linear.weight"):
            gate, up = tensor.chunk(2, dim=1)
            prefix = name.removesuffix("input_linear.weight")
            result |= {f"{prefix}experts.w1.weight": gate, f"{prefix}experts.w3.weight": up}
        else:
            name = f"{name}.weight" if name.endswith(".sinks") else name
            result[name.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
    stacked = {name: torch.stack([parts[index] for index in sorted(parts)]) for name, parts in groups.items()}
    return result | stacked


def _split_heads(tensors: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """DeepSeek's unfolding matrix as two, head by head, the first transposed."""
    result = {}
    for name, tensor in tensors.items():
        if "kv_b_proj" not in name:
            result[name] = tensor
            continue
        heads = tensor.unflatten(0, (config.num_attention_heads, -1))
        key, value = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        result[name.replace("kv_b", "k_b")] = key.mT.contiguous()
        result[name.replace("kv_b", "v_b")] = value.contiguous()
    return result


def quantize(values: np.ndarray[Any, Any], element: str) -> np.ndarray[Any, Any]:
    """The rows of a float32 tensor as ggml quantizes them, uint8 [..., bytes of a row]."""
    kind = GGMLQuantizationType[element]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    *outer, columns = values.shape
    rows = int(np.prod(outer))
    assert columns % block == 0, "ggml would write beyond the row"
    values = np.ascontiguousarray(values, dtype=np.float32)
    out = np.zeros((*outer, columns // block * nbytes), dtype=np.uint8)
    importance = np.ones(columns, dtype=np.float32)
    arguments = (ctypes.c_int(kind.value), values.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p))
    weights = importance.ctypes.data_as(ctypes.c_void_p)
    sizes = (ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns))
    assert ggml_base().ggml_quantize_chunk(*arguments, *sizes, weights) == out.nbytes
    return out


@cache
def ggml_base() -> ctypes.CDLL:
    """The library with ggml's reference quantization, as llama-cpp-python ships it."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def _add_tensor(writer: GGUFWriter, name: str, values: np.ndarray[Any, Any], element: str) -> None:
    if element in ("F32", "F16"):
        writer.add_tensor(name, values.astype({"F32": np.float32, "F16": np.float16}[element]))
        return
    kind = GGMLQuantizationType[element]
    raw = gguf.quants.quantize(values, kind) if element == "BF16" else quantize(values, element)
    writer.add_tensor(name, raw, raw_dtype=kind)


def _convert(architecture: str, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if name.endswith("shared_expert_gate.weight"):
        return tensor[0]
    for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if architecture in _PERMUTED and projection in name:
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _write_metadata(writer: GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if architecture == "deepseek2" else config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture == "deepseek2":
        _write_latent(writer, config)
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    _write_rope(writer, config, head_dim)
    if architecture in ("gemma2", "gemma3", "phi3", "gpt-oss") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gemma3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if hasattr(config, "num_experts_per_tok"):
        _write_experts(writer, architecture, config)
    if architecture.startswith("granite"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _write_latent(writer: GGUFWriter, config: Any) -> None:
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)


def _write_experts(writer: GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if architecture in ("qwen2moe", "qwen3moe", "glm4moe", "deepseek2"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if architecture in ("glm4moe", "deepseek2"):
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        kinds = gguf.ExpertGatingFuncType
        writer.add_expert_gating_func(kinds.SOFTMAX if config.model_type == "deepseek_v2" else kinds.SIGMOID)
        if config.n_group:
            writer.add_expert_group_count(config.n_group)
            writer.add_expert_group_used_count(config.topk_group)


def _write_rope(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    rope = config.rope_parameters
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1.0)))
    kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
    if rope["rope_type"] in kinds:
        writer.add_rope_scaling_type(kinds[rope["rope_type"]])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(1.25)


def _write_rope_factors(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if rope.get("rope_type") == "llama3":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        writer.add_tensor("rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32))


def _write_vocabulary(writer: GGUFWriter, size: int) -> None:
    """A sentence-piece vocabulary: three control tokens, all bytes, single characters, and words of one letter."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = "abcdefghijklmnopqrstuvwxyz.,!?"
    tokens += [*letters, *(f"▁{letter}" for letter in letters)]
    tokens += [f"<pad{index}>" for index in range(size - len(tokens))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens[:size])
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types(kinds[:size])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
