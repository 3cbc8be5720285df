"""What the steps of a tokenizer may make of a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from offload.errors import CheckpointError
from offload.models.text.pipeline import MAX_GROWTH, check_pipeline, steps_of

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
