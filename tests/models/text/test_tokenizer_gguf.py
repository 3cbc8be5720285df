from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support.headers import F32, I32, STRING, U32, Gguf, array, key, tokenizer_keys

from offload.errors import CheckpointError, ClosedError, ContextError, UnsupportedError
from offload.models.checkpoint import open_checkpoint
from offload.models.text import open_tokenizer
from offload.models.text.gguf import GGUFTokenizer
from offload.models.text.llama import llama
from offload.models.text.vocabulary import check_vocabulary

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


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("llama_tokenize", lambda opened: opened.encode("a b")),
        ("llama_token_to_piece", lambda opened: opened.token_bytes(300)),
        ("llama_detokenize", lambda opened: opened.decode([300, 301])),
    ],
)
def test_closing_frees_nothing_under_a_call_of_another_thread(
    demo: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: Any
) -> None:
    native, free = getattr(llama, function), llama.llama_model_free
    inside, go_on, freed, answers = threading.Event(), threading.Event(), list[object](), list[object]()

    def hold(*arguments: object) -> object:
        inside.set()
        assert go_on.wait(20)
        assert not freed
        return native(*arguments)

    monkeypatch.setattr(llama, "llama_model_free", lambda model: (freed.append(model), free(model)))
    opened = open_tokenizer(open_checkpoint(demo))
    assert opened is not None
    expected = call(opened)
    monkeypatch.setattr(llama, function, hold)
    caller = threading.Thread(target=lambda: answers.append(call(opened)))
    caller.start()
    assert inside.wait(20)
    opened.close()
    with pytest.raises(ClosedError):
        call(opened)
    assert not freed
    go_on.set()
    caller.join(20)
    assert answers == [expected]
    assert len(freed) == 1


def test_the_bytes_of_a_token_are_not_those_that_another_thread_asks_for(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {token: tokenizer.token_bytes(token) for token in (300, 400, 500)}
    native = llama.llama_token_to_piece

    def interrupted(vocab: object, token: int, *arguments: object) -> object:
        length = native(vocab, token, *arguments)
        if token != 500:
            other = threading.Thread(target=tokenizer.token_bytes, args=(500,))
            other.start()
            other.join(20)
        return length

    monkeypatch.setattr(llama, "llama_token_to_piece", interrupted)
    assert {token: tokenizer.token_bytes(token) for token in expected} == expected


def test_a_token_longer_than_most_comes_whole(tmp_path: Path) -> None:
    assert tiny_vocabulary(tmp_path / "model.gguf", "x" * 1000).token_bytes(259) == b"x" * 1000


def test_a_path_that_is_not_utf_8_is_opened(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le.gguf"))
    assert tiny_vocabulary(path, "word").token_bytes(259) == b"word"


def test_a_text_beyond_the_limit_is_refused_before_it_is_encoded(tokenizer: Any) -> None:
    text = "hello world " * 100_000
    with pytest.raises(ContextError, match=r"at least \d+ tokens, 128 fit") as caught:
        tokenizer.encode(text, limit=128)
    assert 128 < caught.value.needed_tokens <= len(tokenizer.encode(text))
    assert caught.value.available_tokens == 128


@pytest.mark.parametrize("text", TEXTS)
def test_a_limit_never_refuses_what_fits_it(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.encode(text, limit=len(ids)) == ids


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


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["", "[EMPTY_260]", "x"], r"tokens 260 and 261 are both '\[EMPTY_260\]'"),
        (["[EMPTY_261]", ""], r"tokens 260 and 261 are both '\[EMPTY_261\]'"),
        (["a\0b", "a\0c"], r"token 260, 'a\\x00b', has a NUL"),
        (["\0"], r"token 260, '\\x00', has a NUL"),
    ],
)
def test_tokens_are_compared_as_llama_cpp_reads_them(tmp_path: Any, more: list[str], said: str) -> None:
    tokens = [*vocabulary()["tokenizer.ggml.tokens"], *more]  # type: ignore[misc]
    with pytest.raises(CheckpointError, match=said):
        check_vocabulary(tmp_path, vocabulary(tokens=tokens, scores=None))


def test_one_empty_token_is_in_order(tmp_path: Any) -> None:
    tokens = [*vocabulary()["tokenizer.ggml.tokens"], ""]  # type: ignore[misc]
    assert check_vocabulary(tmp_path, vocabulary(tokens=tokens, scores=None)) == tokens


def test_a_nul_does_not_stand_for_its_byte(tmp_path: Any) -> None:
    tokens = ["\0" if token == "<0x00>" else token for token in vocabulary()["tokenizer.ggml.tokens"]]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="has a NUL"):
        check_vocabulary(tmp_path, vocabulary(tokens=tokens))


@pytest.mark.parametrize("key", ["model", "bos_token_id"])
def test_a_value_of_any_length_is_one_short_line(tmp_path: Any, key: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        check_vocabulary(tmp_path, vocabulary(**{key: "\x1b[2J\n" + "x" * 100_000}))
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert str(caught.value).isprintable()


def test_other_kinds_are_not_supported(tmp_path: Any) -> None:
    with pytest.raises(UnsupportedError, match="bert"):
        check_vocabulary(tmp_path, vocabulary(model="bert"))


def test_the_name_of_an_empty_token_counts_against_a_limit(tmp_path: Path) -> None:
    opened = tiny_vocabulary(tmp_path / "model.gguf", "")
    assert opened.encode("[EMPTY_259]" * 20, add_special=False, limit=20) == [259] * 20


def tiny_vocabulary(path: Path, last: str) -> Any:
    """The tokenizer of a file with a sentencepiece vocabulary whose token 259, a user-defined one, is `last`."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), last]
    keys = (
        *tokenizer_keys("llama"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.scores", F32, [0.0] * 260),
        array("tokenizer.ggml.token_type", I32, [2, 3, 3, *[6] * 256, 4]),
        key("tokenizer.ggml.bos_token_id", U32, 1),
        key("tokenizer.ggml.eos_token_id", U32, 2),
    )
    path.write_bytes(Gguf(keys=keys).build())
    opened = open_tokenizer(open_checkpoint(path))
    assert isinstance(opened, GGUFTokenizer)
    return opened
