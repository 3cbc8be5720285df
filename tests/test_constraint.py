from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from offload.constraint import Constraint, ConstraintCompiler
from offload.errors import UsageError
from offload.models.checkpoint import open_checkpoint
from offload.models.text import open_tokenizer
from offload.models.text.huggingface import HuggingFaceTokenizer

PADDING = 7  # rows of logits that no token has
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["Zoë", "Bob"]}, "age": {"type": "integer", "minimum": 10, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
)


def byte_level(folder: Path) -> HuggingFaceTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(['{"name": "Bob", "age": 1}'] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder, {"eos_token_id": 1})


@pytest.fixture(scope="module", params=["gguf", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if request.param == "gguf":
        opened: Any = open_tokenizer(open_checkpoint(demo))
    else:
        opened = byte_level(tmp_path_factory.mktemp("tokenizer"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, tokenizer.vocab_size + PADDING)


def walk(tokenizer: Any, constraint: Constraint, seed: int) -> str:
    """A random text within the constraint."""
    random, tokens = np.random.default_rng(seed), []
    for _ in range(200):
        logits = random.normal(size=tokenizer.vocab_size + PADDING).astype(np.float32)
        constraint.mask(logits)
        token = int(np.argmax(logits))
        assert np.isfinite(logits[token])
        assert token < tokenizer.vocab_size
        constraint.accept(token)
        if token in tokenizer.eos_tokens:
            assert constraint.finished
            return str(tokenizer.decode(tokens))
        tokens.append(token)
    raise AssertionError("the constraint never ended")


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_satisfies_the_schema(tokenizer: Any, compiler: ConstraintCompiler, seed: int) -> None:
    answer = json.loads(walk(tokenizer, compiler.compile(json_schema=SCHEMA), seed))
    assert answer["name"] in ("Zoë", "Bob")
    assert 10 <= answer["age"] <= 99


@pytest.mark.parametrize("grammar", ['root ::= ("yes" | "no") "!"', 'start: ("yes" | "no") "!"'])
def test_gbnf_and_lark(tokenizer: Any, compiler: ConstraintCompiler, grammar: str) -> None:
    assert {walk(tokenizer, compiler.compile(grammar=grammar), seed) for seed in range(12)} == {"yes!", "no!"}


def test_the_mask_leaves_allowed_logits_as_they_are(tokenizer: Any, compiler: ConstraintCompiler) -> None:
    constraint = compiler.compile(grammar='start: "y"')
    logits = np.arange(tokenizer.vocab_size + PADDING, dtype=np.float32)
    constraint.mask(logits)
    allowed = np.flatnonzero(np.isfinite(logits))
    assert [tokenizer.token_bytes(int(token)) for token in allowed] == [b"y"]
    assert logits[allowed[0]] == allowed[0]


def test_a_forbidden_token_is_an_error(tokenizer: Any, compiler: ConstraintCompiler) -> None:
    constraint = compiler.compile(grammar='start: "y"')
    with pytest.raises(UsageError, match=r"^constraint: "):
        constraint.accept(tokenizer.encode("n", add_special=False)[0])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"json_schema": "{"}, "^json_schema: "),
        ({"json_schema": '{"type": "nonsense"}'}, "^json_schema: .*nonsense"),
        ({"json_schema": "[]"}, "^json_schema: "),
        ({"json_schema": '{"$ref": "http://example.com/x"}'}, "^json_schema: "),
        ({"grammar": 'root ::= "a" missing'}, "^grammar: .*missing"),
        ({"grammar": 'start: "a'}, "^grammar: "),
        ({"grammar": "("}, "^grammar: "),
        ({"grammar": "start: /" + "(" * 101 + "/"}, "nested deeper than 100"),
        ({"json_schema": '{"a":' * 101}, "nested deeper than 100"),
        ({"json_schema": " " * (1024 * 1024 + 1)}, "at most 1048576"),
        ({}, "give one of the two"),
        ({"json_schema": "{}", "grammar": "a"}, "give one of the two"),
    ],
)
def test_a_wrong_source_is_one_line(compiler: ConstraintCompiler, source: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        compiler.compile(**source)
    assert "\n" not in str(caught.value)


def test_a_panic_of_the_library_is_told_without_its_backtrace(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    panic = ValueError("panic: attempt to subtract\n<backtrace>\n   0: rust_begin_unwind\n")
    monkeypatch.setattr(compiler._library, "grammar_from", Mock(side_effect=panic))
    with pytest.raises(UsageError, match=r"^grammar: panic: attempt to subtract$"):
        compiler.compile(grammar="x")


def test_a_tokenizer_without_an_end_cannot_be_constrained(tokenizer: Any) -> None:
    class Endless:
        eos_tokens: frozenset[int] = frozenset()

    with pytest.raises(UsageError, match="no end-of-text token"):
        ConstraintCompiler(Endless(), 10)  # type: ignore[arg-type]
