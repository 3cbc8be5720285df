"""Writes a synthetic GGUF: the library's writer for the metadata, our own loop for the gigabytes."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from harness.demo import value, vocabulary
from harness.shapes import MixtureShape, Shape, Tensor
from harness.weights import matrix, vector
from offload.elements import element_type


def write_gguf(path: Path, shape: Shape, *, seed: int, alignment: int = 32) -> int:
    """Writes `path` and returns its size in bytes. `alignment` is that of tensor data: 32 is what ordinary files have."""
    reader = vocabulary()
    tensors = list(shape.tensors(len(value(reader, "tokenizer.ggml.tokens"))))  # type: ignore[arg-type]
    writer = GGUFWriter(path, shape.architecture)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    _add_hyperparameters(writer, shape)
    _copy_tokenizer(writer, reader)
    for tensor in tensors:
        element = element_of(tensor, shape)
        nbytes = nbytes_of(tensor, shape)
        kind = GGMLQuantizationType[element]
        row_bytes = (*tensor.shape[:-1], element_type(element).row_bytes(tensor.shape[-1]))
        writer.add_tensor_info(tensor.gguf, row_bytes, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, 2)
        _write_data(file, tensors, shape, np.random.Generator(np.random.SFC64(seed)), alignment)
        return file.tell()


def element_of(tensor: Tensor, shape: Shape) -> str:
    """Matrices have the model's type, vectors and routers are F32."""
    return shape.element if len(tensor.shape) > 1 and not tensor.is_router else "F32"


def nbytes_of(tensor: Tensor, shape: Shape) -> int:
    """Bytes of the tensor as stored."""
    return prod(tensor.shape[:-1]) * element_type(element_of(tensor, shape)).row_bytes(tensor.shape[-1])


def _write_data(file: BinaryIO, tensors: list[Tensor], shape: Shape, rng: np.random.Generator, alignment: int) -> None:
    for tensor in tensors:
        file.write(bytes(-file.tell() % alignment))
        if len(tensor.shape) == 1:
            file.write(vector(nbytes_of(tensor, shape), "F32", tensor.fill))
            continue
        file.writelines(matrix(element_of(tensor, shape), tensor.shape, rng))
    file.write(bytes(-file.tell() % alignment))


def _add_hyperparameters(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name("synthetic")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_freq_base(shape.theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    if isinstance(shape, MixtureShape):
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_expert_count(shape.num_experts)
        writer.add_expert_used_count(shape.num_used)
        writer.add_expert_feed_forward_length(shape.intermediate)


def _copy_tokenizer(writer: GGUFWriter, reader: GGUFReader) -> None:
    for key, entry in reader.fields.items():
        if not key.startswith("tokenizer."):
            continue
        if entry.types[0] is GGUFValueType.ARRAY:
            writer.add_key_value(key, entry.contents(), GGUFValueType.ARRAY, sub_type=entry.types[-1])
        else:
            writer.add_key_value(key, entry.contents(), entry.types[0])
