"""What `offload inspect` says of tokenizer and chat template. The template is run once, in the sandbox that chats use."""

from __future__ import annotations

from typing import Any, Final

from offload.errors import CheckpointError, UnsupportedError, UsageError
from offload.models.checkpoint.base import Checkpoint
from offload.models.text import open_tokenizer
from offload.models.text.template import render

_TRIAL: Final = ({"role": "user", "content": "Hello"},)


def describe_text(checkpoint: Checkpoint) -> dict[str, Any]:
    """Kind and size of the tokenizer, and whether it and the chat template work; errors are facts here, not raised."""
    facts: dict[str, Any] = {"tokenizer": tokenizer_kind(checkpoint), "tokenizer_error": None, "vocab_size": None}
    facts |= {"chat_template": False, "chat_template_characters": 0, "chat_template_error": None}
    try:
        tokenizer = open_tokenizer(checkpoint)
    except (CheckpointError, UnsupportedError) as error:
        return facts | {"tokenizer_error": str(error)}
    if tokenizer is None:
        return facts
    try:
        facts["vocab_size"] = tokenizer.vocab_size
        if tokenizer.template is not None:
            facts |= {"chat_template": True, "chat_template_characters": len(tokenizer.template)}
            render(tokenizer.template, _TRIAL, special_strings=tokenizer.special_strings)
    except UsageError as error:
        facts["chat_template_error"] = str(error)
    finally:
        tokenizer.close()
    return facts


def tokenizer_kind(checkpoint: Checkpoint) -> str | None:
    """`tokenizer.ggml.model` of a GGUF, the file of a folder, or None."""
    if checkpoint.format == "gguf":
        kind = checkpoint.metadata.get("tokenizer.ggml.model")
        return str(kind) if kind is not None else None
    names = ("tokenizer.json", "tokenizer.model")
    return next((name for name in names if (checkpoint.path / name).is_file()), None)
