"""What is said of a tokenizer and its template, whatever fails in them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from offload.cli.inspect_text import describe_text
from offload.errors import CheckpointError, UnsupportedError
from offload.models.checkpoint.base import Checkpoint

NONE = {"vocab_size": None, "chat_template": False, "chat_template_characters": 0, "chat_template_error": None}


def checkpoint(path="m.gguf", **metadata):
    kind = "huggingface" if isinstance(path, Path) else "gguf"
    return Checkpoint(
        path=Path(path), format=kind, files=(), architecture="llama", metadata=metadata, tensors={}, fingerprint=""
    )


@pytest.fixture
def opened(monkeypatch):
    """The tokenizer that is found; `closed` counts."""
    tokenizer = SimpleNamespace(vocab_size=5, template=None, special_strings={"bos_token": "<s>"}, closed=0)
    tokenizer.close = lambda: setattr(tokenizer, "closed", tokenizer.closed + 1)
    monkeypatch.setattr("offload.cli.inspect_text.open_tokenizer", lambda _: tokenizer)
    return tokenizer


def test_a_template_is_run_once_with_the_tokens_of_the_model(opened):
    source = opened.template = "{{ raise_exception(bos_token ~ messages|length ~ messages[0].role) }}"
    facts = describe_text(checkpoint())
    assert facts["chat_template_error"] == "chat template: <s>1user"
    assert (facts["chat_template"], facts["chat_template_characters"], opened.closed) == (True, len(source), 1)


@pytest.mark.parametrize("error", [CheckpointError("damaged"), UnsupportedError("word-piece"), None])
def test_a_tokenizer_that_does_not_open_is_a_fact(monkeypatch, error):
    def fail(_):
        if error is not None:
            raise error

    monkeypatch.setattr("offload.cli.inspect_text.open_tokenizer", fail)
    found = describe_text(checkpoint(**{"tokenizer.ggml.model": "gpt2"}))
    assert found == {"tokenizer": "gpt2", "tokenizer_error": None if error is None else str(error), **NONE}
