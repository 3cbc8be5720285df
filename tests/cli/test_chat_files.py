import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.endless import endless

from offload.cli import chat_files
from offload.cli.chat_files import chat_path, history_path, load_chat, save_chat
from offload.cli.chat_input import LineHistory, PlainInput, is_open, unquote
from offload.errors import CheckpointError, StorageError, UsageError
from offload.models.text.bounds import MAX_TEXT_BYTES

MESSAGES = [{"role": "user", "content": "hi, ü"}, {"role": "assistant", "content": "hello\n"}]


def save(path, messages=MESSAGES):
    save_chat(path, messages, model="m", options={"seed": 1, "stop": ("x",)})


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "chat.json")
    assert load_chat(tmp_path / "chat.json") == (MESSAGES, {"seed": 1, "stop": ["x"]})
    assert (tmp_path / "chat.json").stat().st_mode & 0o777 == 0o600


def test_what_is_no_utf8_is_saved_as_json_escapes_and_loaded_as_it_was(tmp_path):
    messages, options = [{"role": "user", "content": "caf\udce9 \ud800, ü"}], {"stop": ("\udce9",)}
    save_chat(tmp_path / "chat.json", messages, model="m\udce9", options=options)
    assert "ü" in (tmp_path / "chat.json").read_text(encoding="utf-8")
    assert load_chat(tmp_path / "chat.json") == (messages, {"stop": ["\udce9"]})


def test_the_folder_of_named_chats_is_made_and_no_other(tmp_path):
    save(chat_path("trip"))
    assert load_chat(chat_path("trip"))[0] == MESSAGES
    with pytest.raises(UsageError, match="no such folder"):
        save(tmp_path / "new" / "chat.json")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="symlinks need a privilege there")
def test_a_symlink_stays_and_its_target_is_written(tmp_path):
    save(tmp_path / "target.json", [])
    (tmp_path / "link.json").symlink_to("target.json")
    save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and load_chat(tmp_path / "target.json")[0] == MESSAGES


def test_nothing_but_a_saved_chat_is_replaced(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="is no saved chat"):
        save(tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF"
    for name in ("empty", "new", "new"):
        save(tmp_path / name)
        assert load_chat(tmp_path / name)[0] == MESSAGES


def make_pipe(path):
    os.mkfifo(path)


def make_folder(path):
    path.mkdir()


def make_loop(path):
    path.symlink_to(path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX files")
@pytest.mark.parametrize("make", [make_pipe, make_folder, make_loop])
def test_what_is_no_regular_file_is_neither_replaced_nor_read(tmp_path, make):
    make(tmp_path / "there")
    kind = (tmp_path / "there").lstat().st_mode
    with pytest.raises(UsageError, match="not a regular file"):
        save(tmp_path / "there")
    assert (tmp_path / "there").lstat().st_mode == kind
    with pytest.raises((CheckpointError, StorageError)):
        load_chat(tmp_path / "there")


def test_a_word_lies_in_the_data_folder_and_a_path_where_it_says(tmp_path):
    assert chat_path("trip-2").parts[-3:] == ("offload", "chats", "trip-2.json")
    assert chat_path(str(tmp_path / "x")) == tmp_path / "x" and chat_path("./x") == Path("x")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "two words", "a\x00b", "-x"])
def test_a_name_that_is_no_word_is_refused(name):
    with pytest.raises(UsageError, match="chat name"):
        chat_path(name)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_chat_and_leaves_no_rest(tmp_path, monkeypatch, step):
    path = tmp_path / "chat.json"
    save(path)

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((chat_files.os, "fsync", full) if step == "fsync" else (Path, "replace", full)))
    with pytest.raises(StorageError, match="No space left") as failure:
        save(path, [])
    monkeypatch.undo()
    assert failure.value.errno == errno.ENOSPC
    assert load_chat(path)[0] == MESSAGES and [file.name for file in tmp_path.iterdir()] == ["chat.json"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_killed_at_any_moment_the_chat_is_whole(tmp_path):
    path = tmp_path / "chat.json"
    script = (
        "import sys; from pathlib import Path; from offload.cli.chat_files import save_chat\n"
        "for n in range(10**9):\n"
        "    save_chat(Path(sys.argv[1]), [{'role': 'user', 'content': str(n) * 20_000}], model='m', options={})"
    )
    for delay_s in (0.0, 0.003, 0.011, 0.024, 0.05):
        with subprocess.Popen([sys.executable, "-c", script, str(path)]) as process:
            deadline = time.monotonic() + 20
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(delay_s)
            process.kill()
        (message,) = load_chat(path)[0]
        assert len(set(message["content"])) <= 10 and len(message["content"]) % 20_000 == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b'{"format": "other", "messages": []}',
        b'{"format": "offload-chat-1"}',
        b'{"format": "offload-chat-1", "messages": [{"role": "user"}]}',
        b'{"format": "offload-chat-1", "messages": [{"role": "user", "content": 7}]}',
        b'{"format": "offload-chat-1", "messages": [], "options": []}',
    ],
)
def test_what_is_no_chat_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a saved chat") as failure:
        load_chat(tmp_path / "chat.json")
    assert "\n" not in str(failure.value)


def test_an_oversized_file_is_refused_unread(tmp_path):
    with (tmp_path / "chat.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="larger than any chat"):
        load_chat(tmp_path / "chat.json")


def test_a_saved_chat_holds_only_known_options(invoke, engine_module, model, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"format": chat_files.FORMAT, "messages": MESSAGES, "options": {"on_prefill": "x"}}))
    result = invoke("chat", model, "--load", path, input="hi\n")
    assert result.exit_code == 2 and "no parameter 'on_prefill'" in result.stderr


def test_history_survives_a_torn_last_line_and_a_full_disk(tmp_path, monkeypatch):
    path = history_path()
    warnings: list[str] = []
    history = LineHistory(path, warnings.append)
    history.store_string("one\ntwo")
    with path.open("ab") as file:
        file.write(b"\n# 2026\n+half \xc3")
    assert list(LineHistory(path, warnings.append).load_history_strings())[-1] == "one\ntwo"
    monkeypatch.setattr(history, "filename", str(tmp_path / "absent" / "history"))
    history.store_string("lost")
    history.store_string("lost")
    assert len(warnings) == 1 and "history is not kept" in warnings[0]


@pytest.mark.parametrize(
    ("text", "opened", "bare"),
    [
        ("hi", False, "hi"),
        ('"""', True, None),
        ('"""a', True, None),
        ('"""a"""', False, "a"),
        ('"""a\nb"""', False, "a\nb"),
        ('""""""', False, ""),
        ('say """x', False, 'say """x'),
    ],
)
def test_triple_quotes(text, opened, bare):
    assert is_open(text) is opened
    if bare is not None:
        assert unquote(text) == bare


@pytest.mark.parametrize("first", [b"", b'"""\n'])
def test_a_message_without_an_end_is_refused_at_the_limit(first):
    stream, raw = endless(first)
    with pytest.raises(UsageError, match=r"a message of more than 64\.0 MiB"):
        PlainInput(io.TextIOWrapper(stream, encoding="utf-8")).read()
    assert raw.given < MAX_TEXT_BYTES + 2**20


def test_an_unclosed_quote_at_the_end_of_a_pipe_still_ends(tmp_path):
    (tmp_path / "in").write_text('"""never closed\n')
    with (tmp_path / "in").open() as stream:
        source = PlainInput(stream)
        assert source.read() == "never closed" and source.read() is None
