"""Hugging Face folders: config.json beside one or more safetensors files.

Only data is read. `auto_map` and everything else in a config.json that names code is ignored, and a file name in an
index may not lead out of the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from offload.errors import CheckpointError
from offload.models.checkpoint.base import Checkpoint, TensorInfo
from offload.models.checkpoint.json_text import read_json_object
from offload.models.checkpoint.merge import merge_tensors
from offload.models.checkpoint.reader import DAMAGED, fingerprint, is_name, is_regular_file, quote
from offload.models.checkpoint.safetensors import SafetensorsFile, read_safetensors

SUFFIX: Final = ".safetensors"
_CONFIG: Final = "config.json"
_INDEX: Final = "model.safetensors.index.json"
_WHOLE: Final = "model.safetensors"
_TEXT_PREFIXES: Final = (("language_model.", ""), ("model.language_model.", "model."), ("lm_head.", "lm_head."))
"""Where a multimodal checkpoint keeps its language model, and what the text-only one calls it."""


def open_huggingface(folder: Path, file: Path | None = None) -> Checkpoint:
    """The checkpoint in a folder, or in one `file` of it. A file that the folder's index names stands for the folder.

    Raises:
        CheckpointError: config.json or a file is missing or malformed, or the index does not match the files.
    """
    config, config_digest = _read_config(folder / _CONFIG)
    weight_map = _read_index(folder / _INDEX) if is_regular_file(folder / _INDEX) else None
    if weight_map is not None and (file is None or file.name in weight_map.values()):
        parts = [read_safetensors(folder / name) for name in sorted(set(weight_map.values()))]
        tensors = _select(parts, weight_map, folder / _INDEX)
    else:
        parts = [read_safetensors(path) for path in ([file] if file else _files(folder))]
        tensors = merge_tensors((part.path, part.tensors) for part in parts)
    architecture, config = str(config["model_type"]), dict(config)
    if architecture == "gemma3" and isinstance(config.get("text_config"), dict):
        architecture, config, tensors = "gemma3_text", _text_config(config), _text_tensors(tensors)
    used = {tensor.extent.path for tensor in tensors.values()}
    return Checkpoint(
        path=folder,
        format="huggingface",
        files=tuple(part.path for part in parts if part.path in used),
        architecture=architecture,
        metadata=config,
        tensors=tensors,
        fingerprint=fingerprint([config_digest, *(part.digest for part in parts)]),
    )


def _read_config(path: Path) -> tuple[Mapping[str, object], bytes]:
    if not is_regular_file(path):
        message = f"{path}: missing; a Hugging Face model has its config.json beside its {SUFFIX} files"
        raise CheckpointError(message, path=str(path))
    config, digest = read_json_object(path)
    model_type = config.get("model_type")
    if not is_name(model_type):
        raise CheckpointError(f"{path}: model_type is {quote(model_type)}, expected a name", path=str(path))
    return config, digest


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name, every file a plain name that exists in the same folder."""
    weight_map = read_json_object(path)[0].get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {quote(weight_map)}, expected an object", path=str(path))
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(SUFFIX) and not set(name) & set("/\\:\0")
        if not plain:
            message = f"{path}: tensor {quote(tensor)}: file {quote(name)} is not the name of a {SUFFIX} file beside it"
            raise CheckpointError(message, path=str(path), tensor=tensor)
    for name in sorted(set(weight_map.values())):
        if not is_regular_file(path.with_name(name)):
            message = f"{path}: file {quote(name)} of the index is missing; fetch all files of the model"
            raise CheckpointError(message, path=str(path))
    return weight_map


def _files(folder: Path) -> list[Path]:
    whole = folder / _WHOLE
    files = [whole] if is_regular_file(whole) else sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise CheckpointError(f"{folder}: no {SUFFIX} file; fetch all files of the model", path=str(folder))
    return files


def _select(parts: Iterable[SafetensorsFile], weight_map: Mapping[str, str], index: Path) -> dict[str, TensorInfo]:
    """The tensors that the index names, each from the file it names."""
    by_name = {part.path.name: part for part in parts}
    tensors = {}
    for tensor, name in weight_map.items():
        part = by_name[name]
        if tensor in part.tensors:
            tensors[tensor] = part.tensors[tensor]
        elif tensor not in part.skipped:
            message = f"{index}: tensor {quote(tensor)} is not in {quote(name)}; {DAMAGED}"
            raise CheckpointError(message, path=str(index), tensor=tensor)
    return tensors


def _text_config(config: Mapping[str, object]) -> dict[str, object]:
    """The text part of a multimodal config, as the text-only architecture would write it."""
    text = config["text_config"]
    assert isinstance(text, dict)
    shared = {key: value for key, value in config.items() if key not in ("text_config", "vision_config")}
    return {**shared, **text, "model_type": "gemma3_text"}


def _text_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    text = {}
    for name, info in tensors.items():
        for prefix, replacement in _TEXT_PREFIXES:
            if name.startswith(prefix):
                text[replacement + name[len(prefix) :]] = info
    return text
