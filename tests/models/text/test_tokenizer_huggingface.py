from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from offload.errors import CheckpointError, ContextError, UnsupportedError
from offload.models.checkpoint.base import Checkpoint
from offload.models.text import open_tokenizer
from offload.models.text.huggingface import HuggingFaceTokenizer
from offload.models.text.pieces import byte_of_character

LINES = ["the quick brown fox jumps over the lazy dog", "Hello world, hello tokens", "numbers 123 456"] * 3
TEXTS = ["Hello wörld 🎉", "  two\n\n\ttabs ", "日本語", "", "the <|end|> of it"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "<|end|>"])
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    letters = sorted({*"".join(LINES), "▁"} - {" "})
    entries = ["<unk>", "<s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "he"]
    merges = [("▁", "t"), ("h", "e")]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "<|end|>"])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **files: object) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("make", "space"), [(byte_level, b""), (sentencepiece, b" ")])
def test_bytes_are_exact_and_decode_is_the_inverse(tmp_path: Path, make: Any, space: bytes, text: str) -> None:
    opened = HuggingFaceTokenizer(write(tmp_path, make()), {})
    ids = opened.encode(text, add_special=False, parse_special=False)
    assert opened.decode(ids) == text
    expected = space + text.encode() if text else b""
    assert b"".join(opened.token_bytes(token) for token in ids) == expected


def test_special_tokens(tmp_path: Path) -> None:
    opened = HuggingFaceTokenizer(write(tmp_path, byte_level(), special_tokens_map={"bos_token": "<s>"}), {})
    assert opened.bos_token == 0
    assert opened.encode("a")[0] == 0
    assert opened.encode("a", add_special=False)[0] != 0
    assert opened.encode("<|end|>", add_special=False) == [1]
    assert len(opened.encode("<|end|>", add_special=False, parse_special=False)) > 1
    assert opened.encode("<|end|>", add_special=False) == [1]
    assert opened.token_bytes(1) == b""
    assert opened.token_bytes(1, special=True) == b"<|end|>"
    (tool,) = opened.encode("<tool>", add_special=False)
    assert opened.token_bytes(tool) == b"<tool>"
    assert opened.vocab_size == tool + 1
    assert opened.token_bytes(10**6) == opened.token_bytes(-1) == b""
    assert opened.decode([10**6, 1]) == ""


def test_encodes_as_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    opened = HuggingFaceTokenizer(write(tmp_path, byte_level()), {})
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert opened.encode(text) == oracle(text)["input_ids"]


@pytest.mark.parametrize("ends", [1, [1, 3]])
def test_ends_come_from_every_file(tmp_path: Path, ends: object) -> None:
    settings = {"eos_token": {"content": "<s>", "special": True}}
    folder = write(tmp_path, byte_level(), generation_config={"eos_token_id": ends}, tokenizer_config=settings)
    expected = {0, 2, *(ends if isinstance(ends, list) else [ends])}
    assert HuggingFaceTokenizer(folder, {"eos_token_id": [2, 10**9, None, True]}).eos_tokens == expected


def test_where_the_template_is_found(tmp_path: Path) -> None:
    settings = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    folder = write(tmp_path, byte_level(), tokenizer_config=settings)
    assert HuggingFaceTokenizer(folder, {}).template == "D"
    (folder / "tokenizer_config.json").write_text('{"chat_template": "S"}')
    assert HuggingFaceTokenizer(folder, {}).template == "S"
    (folder / "chat_template.jinja").write_text("J")
    assert HuggingFaceTokenizer(folder, {}).template == "J"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert HuggingFaceTokenizer(folder, {}).template is None


def test_a_folder_without_a_tokenizer_is_for_token_ids(tmp_path: Path) -> None:
    checkpoint = Checkpoint(
        path=tmp_path, format="huggingface", files=(), architecture="llama", metadata={}, tensors={}, fingerprint=""
    )
    assert open_tokenizer(checkpoint) is None
    write(tmp_path, byte_level())
    assert isinstance(open_tokenizer(checkpoint), HuggingFaceTokenizer)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff" * 100, b'{"model": 1}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_is_one_error(tmp_path: Path, name: str, damage: bytes) -> None:
    write(tmp_path, byte_level())
    (tmp_path / name).write_bytes(damage)
    if name != "tokenizer.json" and damage == b'{"model": 1}':
        return
    with pytest.raises(CheckpointError, match=name):
        HuggingFaceTokenizer(tmp_path, {})


def test_word_pieces_are_not_supported(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="word-piece"):
        HuggingFaceTokenizer(write(tmp_path, tokenizer), {})


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    assert set(byte_of_character()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_of_character().values()) == [bytes([byte]) for byte in range(256)]


def changed(folder: Path, tokenizer: Tokenizer, **parts: object) -> Path:
    """A folder whose tokenizer.json has other parts than `tokenizer`."""
    write(folder, tokenizer)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"model": {"type": "Unigram", "vocab": [["h", -1.0]], "unk_id": None}}, "`unk_id` is missing"),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}, r"Missing \[UNK\] token"),
        ({"model": {"type": "BPE", "vocab": {"q": 0}, "merges": [], "unk_token": "nope"}}, "`nope` not found"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(x+x+)+y"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            "retry",
        ),
    ],
)
def test_a_text_that_the_library_fails_on_is_one_error(tmp_path: Path, parts: dict[str, object], said: str) -> None:
    opened = HuggingFaceTokenizer(changed(tmp_path, byte_level(), **parts), {})
    for _ in range(2):  # nor does a failure leave a lock behind
        with pytest.raises(CheckpointError, match=rf"tokenizer\.json: model or pre_tokenizer: .*{said}"):
            opened.encode("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")


def test_a_split_every_zero_characters_is_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path, byte_level(), pre_tokenizer={"type": "FixedLength", "length": 0})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: pre_tokenizer: FixedLength"):
        HuggingFaceTokenizer(folder, {})


def test_a_table_longer_than_the_file_is_refused_before_room_is_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bytes] = []
    monkeypatch.setattr("offload.models.text.huggingface.Library", SimpleNamespace(from_buffer=given.append))
    folder = changed(
        tmp_path, byte_level(), normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    )  # of 4 GiB
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: normalizer: precompiled_charsmap"):
        HuggingFaceTokenizer(folder, {})
    assert not given


def test_a_template_of_a_million_tokens_is_refused(tmp_path: Path) -> None:
    special = {"x": {"id": "x", "ids": [0] * 1_000, "tokens": ["x"] * 1_000}}
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}, *[{"SpecialToken": {"id": "x", "type_id": 0}}] * 1_000]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: post_processor: "):
        HuggingFaceTokenizer(changed(tmp_path, byte_level(), post_processor=template), {})


@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_what_training_leaves_out_at_random_is_kept(tmp_path: Path, dropout: float) -> None:
    text = "the quick brown fox " * 20
    expected = HuggingFaceTokenizer(write(tmp_path, byte_level()), {}).encode(text)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    opened = HuggingFaceTokenizer(changed(tmp_path, byte_level(), model=model | {"dropout": dropout}), {})
    assert [opened.encode(text) for _ in range(20)] == [expected] * 20


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bos_token": "\ud800"}, "'bos_token'"),
        ({"eos_token": {"content": "a\udfff"}}, "'eos_token'"),
        ({"chat_template": [{"name": [], "template": "T"}]}, "chat_template"),
        ({"chat_template": ["T"]}, "chat_template"),
    ],
)
def test_settings_of_the_wrong_kind_name_file_and_key(tmp_path: Path, settings: object, said: str) -> None:
    folder = write(tmp_path, byte_level(), tokenizer_config=settings)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {said}"):
        HuggingFaceTokenizer(folder, {})


def test_special_tokens_of_no_text_in_the_older_file(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(), special_tokens_map={"bos_token": "\ud800"})
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: 'bos_token'"):
        HuggingFaceTokenizer(folder, {})


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_text_beyond_the_limit_is_refused_before_it_is_encoded(tmp_path: Path, make: Any) -> None:
    opened = HuggingFaceTokenizer(write(tmp_path, make()), {})
    text = "hello world " * 10_000
    with pytest.raises(ContextError, match=r"at least \d+ tokens, 64 fit") as caught:
        opened.encode(text, limit=64)
    assert 64 < caught.value.needed_tokens <= len(opened.encode(text))
    for text in TEXTS:
        ids = opened.encode(text)
        assert opened.encode(text, limit=len(ids)) == ids


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    ],
)
def test_a_tokenizer_that_drops_text_has_no_bound(tmp_path: Path, change: dict[str, object]) -> None:
    opened = HuggingFaceTokenizer(changed(tmp_path, sentencepiece(), **change), {})
    ids = opened.encode("he" + " " * 5_000)
    assert opened.encode("he" + " " * 5_000, limit=len(ids)) == ids


def test_a_token_that_swallows_spaces_leaves_them_uncounted(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True, special=True)])
    opened = HuggingFaceTokenizer(write(tmp_path, tokenizer), {})
    assert len(opened.encode("<|user|>" + "\n" * 1_000, limit=2)) == 2
