"""What the steps of a tokenizer may make of a text."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from offload.errors import CheckpointError
from offload.models.text.pipeline import MAX_ADDED, MAX_GROWTH, check_description, check_pipeline, steps_of

DOUBLE = normalizers.Replace("a", "aa")
LLAMA = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
ALBERT = [
    normalizers.Replace("``", '"'),
    normalizers.Replace("''", '"'),
    normalizers.NFKD(),
    normalizers.StripAccents(),
]


def check(*steps: normalizers.Normalizer) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    check_pipeline(Path("tokenizer.json"), tokenizer)


@pytest.mark.parametrize("steps", [LLAMA, ALBERT, [normalizers.NFC()], [normalizers.Nmt(), normalizers.NFKC()]])
def test_what_models_use_passes(steps: list[normalizers.Normalizer]) -> None:
    check(*steps)


@pytest.mark.parametrize(
    "steps",
    [
        [normalizers.Replace("a", "a" * (MAX_GROWTH + 1))],
        [DOUBLE] * 9,
        [normalizers.Sequence([DOUBLE] * 5), normalizers.Sequence([DOUBLE] * 5)],
        [normalizers.Prepend("a" * 2_000)],
        [normalizers.ByteLevel()] * 9,
    ],
)
def test_what_makes_gigabytes_of_a_word_is_refused(steps: list[normalizers.Normalizer]) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: normalizer: it can make a text"):
        check(*steps)


def test_growth_is_bounded_to_the_letter() -> None:
    check(*[DOUBLE] * 8)


def test_a_decoder_is_bounded_as_well() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Sequence([decoders.Replace("a", "a" * 100)] * 2)
    with pytest.raises(CheckpointError, match="decoder"):
        check_pipeline(Path("tokenizer.json"), tokenizer)


def test_sequences_are_opened() -> None:
    nested = normalizers.Sequence([normalizers.Sequence([DOUBLE]), normalizers.NFC()])
    assert sorted(step["type"] for step in steps_of(nested)) == ["NFC", "Replace", "Sequence"]
    assert list(steps_of(None)) == []


@pytest.mark.parametrize("size", [33, 300])
def test_the_longest_entry_of_a_table_counts(size: int) -> None:
    trie = bytes(1024)
    table = normalizers.Precompiled(len(trie).to_bytes(4, "little") + trie + b"b\0" + b"a" * size + b"\0")
    if size < MAX_GROWTH:
        check(table)
        return
    with pytest.raises(CheckpointError, match="normalizer"):
        check(table)


def described(**parts: object) -> bytes:
    """A tokenizer.json with these parts."""
    return json.dumps(json.loads(Tokenizer(models.BPE()).to_str()) | parts).encode()


def table(trie_nbytes: int) -> dict[str, object]:
    """A normalizer whose table has 8 bytes after the size of its trie, which says `trie_nbytes`."""
    text = base64.b64encode(trie_nbytes.to_bytes(4, "little") + bytes(8)).decode()
    return {"type": "Precompiled", "precompiled_charsmap": text}


@pytest.mark.parametrize("normalizer", [None, table(8), {"type": "Sequence", "normalizers": [table(4), table(0)]}])
def test_a_table_that_holds_its_trie_passes(normalizer: object) -> None:
    check_description(Path("tokenizer.json"), described(normalizer=normalizer))


@pytest.mark.parametrize(
    ("normalizer", "said"),
    [
        ({"type": "Precompiled", "precompiled_charsmap": "/////w=="}, "precompiled_charsmap"),
        ({"type": "Precompiled", "precompiled_charsmap": "AAA="}, "precompiled_charsmap"),
        ({"type": "Precompiled", "precompiled_charsmap": "?"}, "precompiled_charsmap"),
        ({"type": "Precompiled", "precompiled_charsmap": [0, 0, 0, 0]}, "precompiled_charsmap"),
        (table(9), "precompiled_charsmap"),
        ({"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [table(2**32 - 1)]}]}, "charsmap"),
        ({"type": "Sequence", "normalizers": table(2**32 - 1)}, "precompiled_charsmap"),
        ([[table(2**32 - 1)]], "expected an object"),
        ({"type": "Sequence", "normalizers": [["/////w=="]]}, "expected an object"),
        ({"type": "Sequence", "normalizers": [{"type": "NFC"}] * 10_000}, "more than 10000 entries"),
    ],
)
def test_what_the_library_must_not_read_is_refused_by_the_file(normalizer: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^tokenizer\.json: normalizer: .*{said}"):
        check_description(Path("tokenizer.json"), described(normalizer=normalizer))


@pytest.mark.parametrize("key", ["normalizer", "norm\\u0061lizer"])
def test_no_part_hides_behind_a_second_one_of_its_name(key: str) -> None:
    data = described(normalizer=table(2**32 - 1))[:-1] + f', "{key}": null}}'.encode()
    with pytest.raises(CheckpointError, match="twice"):
        check_description(Path("tokenizer.json"), data)


def test_many_small_things_are_refused_before_they_are_read() -> None:
    data = described(spare=0)[:-2] + b"[" + b"[]," * 3_000_000 + b"0]}"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: 60000\d\d commas and brackets, at most 6000000"):
        check_description(Path("tokenizer.json"), data)


def test_a_vocabulary_is_none_of_the_parts() -> None:
    """Nor does it matter how its characters are encoded, or that one comes again."""
    model = '{"type": "BPE", "vocab": {"precompiled_charsmap": 0, "\\u00c3\\u00a9": 1, "\u00e9": 1, "a": 2, "a": 3}}'
    data = described().replace(b'"model": {', b'"model": ' + model.encode() + b', "spare": {')
    assert model.encode() in data
    check_description(Path("tokenizer.json"), data)


def check_template(single: str, names: int, *, ids: int = 1, times: int = 1) -> None:
    """`times` templates of `single`, where x0, x1, ... stand for `ids` tokens each."""
    tokens: list[Any] = [{"id": f"x{n}", "ids": [0] * ids, "tokens": ["x"] * ids} for n in range(names)]
    template = processors.TemplateProcessing(single, special_tokens=tokens)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.post_processor = processors.Sequence([template] * times)
    check_pipeline(Path("tokenizer.json"), tokenizer)


def test_templates_add_a_few_tokens_to_one_text() -> None:
    check_template("x0 $A x1", 2)
    check_template("x0 $A", 1, ids=MAX_ADDED)
    check_template("x0 $A", 1, ids=MAX_ADDED // 4, times=4)


@pytest.mark.parametrize(
    ("single", "names", "ids", "times"),
    [
        ("x0 $A", 1, MAX_ADDED + 1, 1),
        ("$A" + " x0" * (MAX_ADDED + 1), 1, 1, 1),
        (" ".join(f"x{n}" for n in range(40)) + " $A", 40, 40, 1),
        ("x0 $A", 1, MAX_ADDED // 4, 5),
    ],
)
def test_a_template_that_adds_thousands_of_tokens_is_refused(single: str, names: int, ids: int, times: int) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: post_processor: it can make a text"):
        check_template(single, names, ids=ids, times=times)


def test_a_template_that_repeats_the_text_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"post_processor: it repeats the text"):
        check_template("$A x0 $A", 1)
