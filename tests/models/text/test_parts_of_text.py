"""Bounds of texts, steps of tokenizers, and chat templates: what is refused, and that nothing else is changed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from offload.errors import BackendError, CheckpointError, ContextError, UsageError
from offload.models.text import sandbox, template
from offload.models.text.bounds import TextBound
from offload.models.text.pieces import byte_of_character
from offload.models.text.pipeline import MAX_GROWTH, check_pipeline, text_bound

SAMPLE = st.lists(st.sampled_from(["ab", " ab", "𝐚𝐛", "ﬁ½", "é漢🎉", " \n\t", "a"]), max_size=9).map("".join)


@given(st.lists(st.binary(max_size=6)), st.integers(6, 9), st.booleans())
def test_a_bound_is_never_above_the_tokens(tokens: list[bytes], longest: int, strips: bool) -> None:
    bound = TextBound(longest, strips)
    text = b"".join(token + b" \n" * strips for token in tokens)
    bound.check(text, len(tokens))
    least = bound.least_tokens(text)
    if least:
        with pytest.raises(
            ContextError, match=f"{len(text)} bytes are at least {least} tokens, {least - 1} f"
        ) as caught:
            bound.check(text, least - 1)
        assert (caught.value.needed_tokens, caught.value.available_tokens) == (least, least - 1)


def bytes_tokenizer(*steps: normalizers.Normalizer) -> Tokenizer:
    """Byte-level, with two tokens of several bytes."""
    vocabulary = {piece: number for number, piece in enumerate([*byte_of_character(), "ab", "Ġab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "ab")]))
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


PLAIN = (normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase())
LOSSLESS = (*PLAIN, normalizers.Prepend("a"), normalizers.Replace("a", "bb"))


@given(st.lists(st.sampled_from(LOSSLESS), max_size=2), SAMPLE)
def test_no_text_has_fewer_tokens_than_its_bound(steps: list[normalizers.Normalizer], text: str) -> None:
    tokenizer = bytes_tokenizer(*steps)
    bound = text_bound(tokenizer, "byte_level")
    assert bound.longest is not None
    assert bound.least_tokens(text.encode()) <= len(tokenizer.encode(text).ids)


GROWING = st.builds(normalizers.Replace, st.sampled_from(["a", "b", "ab"]), st.integers(0, 20).map(lambda n: "ab" * n))


@given(st.lists(GROWING, max_size=4), st.text("abé", min_size=1, max_size=8))
def test_steps_that_pass_make_no_more_of_a_text_than_was_judged(steps: list[normalizers.Normalizer], text: str) -> None:
    tokenizer = bytes_tokenizer(*steps)
    try:
        check_pipeline(Path("tokenizer.json"), tokenizer)
    except CheckpointError:
        return
    grown = tokenizer.normalizer.normalize_str(text)
    assert len(grown.encode()) <= MAX_GROWTH * len(text.encode())


def request(source: str, **context: Any) -> dict[str, Any]:
    return {"template": source, "context": context, "fuel": 10_000, "limit_characters": 100}


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_what_is_said_stands_in_the_prompt_as_it_was_said(content: str) -> None:
    asked = request("{{ messages[0].content }}|{{ messages[0].content|length }}", messages=[{"content": content}])
    assert sandbox.render(asked) == {"text": f"{content}|{len(content)}"}
    quoted = json.dumps(content[:4], ensure_ascii=False)
    assert sandbox.render(request("{{ x|tojson }}", x=content[:4])) == {"text": quoted}
    for size in (99, 100, 101):
        fits = {"text": "x" * size} if size < 101 else {"failed": "101 characters of output, at most 100 allowed"}
        assert sandbox.render(request(f"{{{{ 'x' * {size} }}}}")) == fits


def test_a_template_knows_its_names_and_neither_messages_nor_the_prompt_can_be_replaced() -> None:
    source = (
        "{% generation %}{{ bos_token }}{% endgeneration %}{%- generation -%} {{ tools }} {%- endgeneration -%}"
        "|{{ documents }}|{{ messages|length }}|{{ add_generation_prompt }}|{{ own }}"
    )
    variables = {"messages": [1, 2], "add_generation_prompt": True, "own": 5}
    text = template.render(
        source, [], add_generation_prompt=False, special_strings={"bos_token": "<s>", "own": 4}, variables=variables
    )
    assert text == "<s>None|None|0|False|5"


@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        (subprocess.TimeoutExpired("python", 10), UsageError, "not done after 10 s, stopped; use a raw prompt"),
        (OSError(12, "Cannot allocate memory"), BackendError, "no process to render it in .*Cannot allocate memory"),
    ],
)
def test_a_process_that_does_not_start_or_end_is_one_line(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, error: type[Exception], said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(error, match=f"^chat template: [^\n]*{said}"):
        template.render("text", [])
    monkeypatch.setattr(template, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match="pip install minijinja"):
        template.render("text", [])
