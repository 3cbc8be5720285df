"""FP8 in Hugging Face checkpoints: which schemes there are, and where the scales of a matrix lie.

    weight_scale_inv [ceil(out / 128), ceil(in / 128)]    of each block of `weight_block_size` (DeepSeek-V3, Qwen3-FP8)
    weight_scale     [ceil(out / 128), ceil(in / 128)]    the same, where a group says `block_structure` (compressed-tensors)
    weight_scale     [out, 1]                             of each row (fbgemm, compressed-tensors)
    weight_scale     [1] or []                            of the whole matrix (compressed-tensors, AutoFP8)

Whatever its name, a scale is what an element is multiplied by. Scales of activations, which such files may have too, are not
read: activations are not quantized here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from offload.elements import BF16, F8_E4M3, F16, F32
from offload.errors import CheckpointError, UnsupportedError
from offload.models.checkpoint.base import Checkpoint, TensorInfo
from offload.models.checkpoint.reader import quote

_COMPRESSED: Final = "compressed-tensors"
_SCHEMES: Final = ("fp8", "fbgemm_fp8", _COMPRESSED)
_FORMATS: Final = ("float-quantized", "naive-quantized")  # of compressed-tensors: one number for each element
_SUFFIXES: Final = ("_scale_inv", "_scale")


def check_scheme(path: Path, method: str, config: Mapping[str, object], schemes: Collection[str]) -> None:
    """
    Args:
        config: the section `quantization_config`. schemes: what the family knows beside FP8.

    Raises:
        UnsupportedError: the weights are quantized in a way that nothing here decodes.
    """
    name = repr(method)
    if method == _COMPRESSED:
        rotated = bool(config.get("transform_config"))
        if config.get("format") in _FORMATS and not rotated:
            return
        name += " with transforms" if rotated else f" in the format {quote(config.get('format'))}"
    elif method in _SCHEMES or method in schemes:
        return
    raise UnsupportedError(f"{path}: weights are quantized by {name}; use the original weights or a GGUF of this model")


class ScaleTensor(NamedTuple):
    """Where the scales of a matrix are stored, and of how many rows and columns each is."""

    tensor: TensorInfo
    rows: int
    columns: int


def find_scales(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]
) -> ScaleTensor:
    """The scales of the FP8 matrix `name`, of this shape, among `tensors`.

    Raises:
        CheckpointError: they are missing, or not as many as the matrix needs. UnsupportedError: they are not all it has.
    """

    def error(problem: str) -> CheckpointError:
        path = str(checkpoint.path)
        return CheckpointError(f"{path}: tensor {name} is {F8_E4M3}, and {problem}", path=path, tensor=name)

    found = next((tensors[name + suffix] for suffix in _SUFFIXES if name + suffix in tensors), None)
    if found is None:
        raise error("has no weight_scale_inv or weight_scale beside it; fetch all files of the model")
    if found.element not in (F32, F16, BF16):
        raise UnsupportedError(f"{checkpoint.path}: {found.name}: scales of type {found.element} are not supported")
    if f"{name}_zero_point" in tensors:
        raise UnsupportedError(f"{checkpoint.path}: {name}: FP8 with zero points is not supported")
    rows, columns = shape
    if found.num_elements == 1:
        return ScaleTensor(found, rows, columns)
    if found.shape in ((rows,), (rows, 1)):
        return ScaleTensor(found, 1, columns)
    blocks = set(_blocks(checkpoint.metadata.get("quantization_config")))
    fitting = [block for block in blocks if found.shape == (-(-rows // block[0]), -(-columns // block[1]))]
    if len(fitting) != 1:
        raise error(f"its scales {found.name} have shape {found.shape}; expected that of one weight_block_size")
    return ScaleTensor(found, *fitting[0])


def _blocks(config: object) -> Iterator[tuple[int, int]]:
    """The block sizes that a `quantization_config` names."""
    sections = [_section(config)]
    sections += [
        _section(_section(group).get("weights")) for group in _section(sections[0].get("config_groups")).values()
    ]
    for section in sections:
        for key in ("weight_block_size", "block_structure"):
            block = section.get(key)
            if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
                yield block[0], block[1]


def _section(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
