"""Writes a synthetic Hugging Face folder: one safetensors file, config.json, and the demo vocabulary as tokenizer.json."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from harness.demo import value, vocabulary
from harness.shapes import Shape, Tensor
from harness.weights import matrix, vector

CONTROL = 3  # token type of special tokens in GGUF
BF16_BYTES = 2


def write_folder(folder: Path, shape: Shape, *, seed: int) -> int:
    """Writes `folder` and returns the size of its weights in bytes. Every tensor is BF16."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = vocabulary()
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    _write_config(folder, shape, len(tokens))
    _write_tokenizer(folder, reader, tokens)
    tensors = list(shape.tensors(len(tokens)))
    rng = np.random.Generator(np.random.SFC64(seed))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            if len(tensor.shape) == 1:
                file.write(vector(BF16_BYTES * tensor.shape[0], "BF16"))
                continue
            for chunk in matrix("BF16", tensor.shape, rng):
                file.write(chunk)
        return file.tell()


def _header(tensors: list[Tensor]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + BF16_BYTES * prod(tensor.shape)
        table[tensor.huggingface] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_config(folder: Path, shape: Shape, vocab_size: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.theta,
        "tie_word_embeddings": shape.tied,
        "vocab_size": vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_tokenizer(folder: Path, reader: GGUFReader, tokens: list[str]) -> None:
    merges = value(reader, "tokenizer.ggml.merges")
    types = value(reader, "tokenizer.ggml.token_type")
    assert isinstance(merges, list)
    assert isinstance(types, list)
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "chat_template": value(reader, "tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
