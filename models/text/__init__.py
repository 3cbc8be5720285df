"""Text in and out: tokenizers of both checkpoint formats, and chat templates."""

from __future__ import annotations

from offload.models.checkpoint.base import Checkpoint
from offload.models.text.base import Tokenizer as Tokenizer

__all__ = ["Tokenizer", "open_tokenizer"]


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None where it brings none and is used by token ids only.

    Raises:
        CheckpointError: the tokenizer's files are damaged.
        UnsupportedError: a kind of tokenizer that no supported architecture uses.
    """
    # the libraries are loaded on demand: each costs resident memory that the other format does not need
    if checkpoint.format == "gguf":
        from offload.models.text import gguf

        return (
            gguf.GGUFTokenizer(checkpoint.path, checkpoint.metadata)
            if gguf.has_vocabulary(checkpoint.metadata)
            else None
        )
    if not (checkpoint.path / "tokenizer.json").is_file():
        return None
    from offload.models.text.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(checkpoint.path, checkpoint.metadata)
