"""llama.cpp's regular expressions kill the process where their stack ends, so these texts go through another process."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.headers import STRING, U32, Gguf, array, key, tokenizer_keys

from offload.errors import UnsupportedError, UsageError
from offload.models.text.pieces import byte_of_character
from offload.models.text.stack import MAX_RUN, call_with_stack, needs_stack

ENCODE = """
import sys
from pathlib import Path
from offload.models.checkpoint import open_checkpoint
from offload.models.text import open_tokenizer
tokenizer = open_tokenizer(open_checkpoint(Path(sys.argv[1])))
for sample in ("a", "A", "Aa", " ", ".", "1", "\\n", "\\u65e5", ".\\n"):
    text = (sample * MAX_RUN)[:MAX_RUN - 2]
    print(len(tokenizer.encode(text)), len(text.encode()))
""".replace("MAX_RUN", str(MAX_RUN))


def bpe(folder: Path, pre: str) -> Path:
    """A vocabulary of single bytes."""
    tokens = ["<s>", "</s>", *byte_of_character()]
    keys = (
        *tokenizer_keys("gpt2"),
        key("tokenizer.ggml.pre", STRING, pre),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.merges", STRING, ["a b"]),
        key("tokenizer.ggml.bos_token_id", U32, 0),
        key("tokenizer.ggml.eos_token_id", U32, 1),
    )
    path = folder / "vocabulary.gguf"
    path.write_bytes(Gguf(keys=keys).build())
    return path


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "bloom", "default"])
def test_the_longest_runs_are_tokenized(tmp_path: Path, pre: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENCODE, str(bpe(tmp_path, pre))], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        tokens, nbytes = map(int, line.split())
        assert nbytes <= tokens <= nbytes + 1


@pytest.mark.parametrize("sample", ["a", "\u65e5", " ", "\u3000 ", "\x1c", "\n"])
def test_longer_runs_are_refused(sample: str) -> None:
    with pytest.raises(UsageError, match=f"at most {MAX_RUN}"):
        call_with_stack(lambda: 0, f"a text, then {sample * (MAX_RUN + 1)}")


def test_long_texts_of_short_runs_stay_on_this_thread() -> None:
    assert call_with_stack(threading.current_thread, "some words " * MAX_RUN) is threading.current_thread()


def test_the_stack_size_of_other_threads_is_left_alone() -> None:
    before = threading.stack_size()
    assert call_with_stack(threading.current_thread, "a" * 1000) is not threading.current_thread()
    assert threading.stack_size() == before


def test_an_error_crosses_the_thread() -> None:
    def fail() -> None:
        raise UsageError("closed")

    with pytest.raises(UsageError, match="closed"):
        call_with_stack(fail, "a" * 1000)


@pytest.mark.parametrize(
    ("model", "pre", "expected"),
    [
        ("gpt2", "tekken", True),
        ("gpt2", None, True),
        ("gpt2", ["x"], True),
        ("gpt2", "qwen2", False),
        ("llama", "default", False),
    ],
)
def test_who_needs_it(model: str, pre: object, expected: bool) -> None:
    assert needs_stack(Path("m.gguf"), {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre}) is expected


@pytest.mark.parametrize("pre", ["exaone-moe", "superbpe"])
def test_what_no_run_bounds_is_not_supported(pre: str) -> None:
    with pytest.raises(UnsupportedError, match=pre):
        needs_stack(Path("m.gguf"), {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre})
