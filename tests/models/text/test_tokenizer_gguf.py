from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload.errors import CheckpointError, ClosedError, UnsupportedError
from offload.models.checkpoint import open_checkpoint
from offload.models.text import open_tokenizer
from offload.models.text.gguf import GGUFTokenizer, check_vocabulary

TEXTS = [
    "",
    "Hello wörld 🎉",
    "  two\n\n\ttabs ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "日本語" * 50,
    "a" * 5000,
    "x\ud800y",
]


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Any:
    opened = open_tokenizer(open_checkpoint(demo))
    assert isinstance(opened, GGUFTokenizer)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def oracle(demo: Path) -> Any:
    from llama_cpp import Llama

    opened = Llama(str(demo), vocab_only=True, verbose=False)
    yield opened
    opened.close()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("parse_special", [True, False])
def test_encodes_as_llama_cpp_and_back(tokenizer: Any, oracle: Any, text: str, parse_special: bool) -> None:
    data = text.encode(errors="replace")
    ids = tokenizer.encode(text, parse_special=parse_special)
    assert ids == oracle.tokenize(data, add_bos=True, special=parse_special)
    assert tokenizer.decode(ids, special=True) == data.decode()
    assert b"".join(tokenizer.token_bytes(token, special=True) for token in ids) == data


def test_control_tokens_add_nothing_unless_asked_for(tokenizer: Any) -> None:
    (end,) = tokenizer.encode("<|im_end|>")
    assert end in tokenizer.eos_tokens
    assert tokenizer.token_bytes(end) == b""
    assert tokenizer.token_bytes(end, special=True) == b"<|im_end|>"
    assert tokenizer.decode([end, *tokenizer.encode("a")]) == "a"
    assert len(tokenizer.encode("<|im_end|>", parse_special=False)) > 1


def test_what_templates_and_stopping_need(tokenizer: Any) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.special_strings["bos_token"] == "<|im_start|>"
    assert tokenizer.special_strings["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.template


def test_unknown_ids_have_no_text(tokenizer: Any) -> None:
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([-5, 10**9]) == ""


def test_a_closed_tokenizer_says_so(demo: Path) -> None:
    opened = open_tokenizer(open_checkpoint(demo))
    assert opened is not None
    opened.close()
    opened.close()
    with pytest.raises(ClosedError):
        opened.encode("a")


def vocabulary(**changes: object) -> dict[str, object]:
    """A sentencepiece vocabulary that is in order, but for `changes`; None removes a key."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a"]
    keys = {"model": "llama", "tokens": tokens, "scores": [0.0] * len(tokens), "bos_token_id": 1} | changes
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items() if value is not None}


def test_a_vocabulary_in_order_passes(tmp_path: Any) -> None:
    assert len(check_vocabulary(tmp_path, vocabulary())) == 260


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": None},
        {"tokens": []},
        {"tokens": "abc"},
        {"tokens": [1, 2]},
        {"tokens": ["a", "a"]},
        {"tokens": ["<unk>", "<s>", "</s>"], "scores": None},
        {"scores": [0.0]},
        {"scores": ["x"] * 260},
        {"token_type": [1]},
        {"bos_token_id": 260},
        {"bos_token_id": -1},
        {"eos_token_id": "2"},
    ],
)
def test_what_llama_cpp_would_abort_on_is_refused(tmp_path: Any, changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\."):
        check_vocabulary(tmp_path, vocabulary(**changes))


def test_other_kinds_are_not_supported(tmp_path: Any) -> None:
    with pytest.raises(UnsupportedError, match="bert"):
        check_vocabulary(tmp_path, vocabulary(model="bert"))
