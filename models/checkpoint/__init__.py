"""GGUF files and Hugging Face folders, parsed and checked against the size of the files.

`open_checkpoint` is the way in. It recognises a format by content and folder layout; it reads headers, no weights.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Final

from offload.errors import CheckpointError
from offload.models.checkpoint.base import Checkpoint, TensorInfo
from offload.models.checkpoint.gguf import MAGIC, open_gguf, split_name
from offload.models.checkpoint.huggingface import SUFFIX, open_huggingface
from offload.models.checkpoint.reader import HeaderReader, file_mode, is_regular_file, quote

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Parse the model at `path`: a GGUF file, any part of a split GGUF, a Hugging Face folder, a .safetensors file
    beside its config.json, or a folder that holds one GGUF.

    Raises:
        CheckpointError: nothing there, not a model, a pickle, or a file that is malformed or lies about itself.
        StorageError: a read failed.
    """
    path = Path(path).absolute()
    if stat.S_ISDIR(file_mode(path)):
        return _open_folder(path)
    if path.suffix == SUFFIX:
        return open_huggingface(path.parent, path)
    with HeaderReader(path, limit_bytes=len(MAGIC)) as reader:
        magic = reader.take(min(len(MAGIC), reader.size), "magic")
    if magic == MAGIC:
        return open_gguf(path)
    if path.suffix in _PICKLES:
        raise _pickle_error(path)
    raise CheckpointError(
        f"{path}: starts with {quote(magic)}, a GGUF file starts with {MAGIC!r}; "
        "name a .gguf file, a .safetensors file or a Hugging Face folder",
        path=str(path),
    )


def _open_folder(folder: Path) -> Checkpoint:
    try:
        files = sorted(path for path in folder.iterdir() if is_regular_file(path))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}", path=str(folder)) from error
    if any(path.suffix == SUFFIX for path in files):
        return open_huggingface(folder)
    ggufs = [path for path in files if path.suffix == ".gguf"]
    models = {name.prefix if (name := split_name(path)) else path.name for path in ggufs}
    if len(models) == 1:
        return open_gguf(ggufs[0])
    if models:
        names = ", ".join(path.name for path in ggufs[:4])
        raise CheckpointError(f"{folder}: holds {len(models)} GGUF models ({names}); name one", path=str(folder))
    pickles = [path for path in files if path.suffix in _PICKLES]
    if pickles:
        raise _pickle_error(pickles[0])
    raise CheckpointError(
        f"{folder}: holds no .gguf and no .safetensors file; name the model's folder", path=str(folder)
    )


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: a pickle can run code and is never loaded; fetch the model's .safetensors files, or convert it with "
        "transformers' save_pretrained(..., safe_serialization=True)",
        path=str(path),
    )
