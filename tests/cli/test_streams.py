"""Standard streams that are missing, and encodings that cannot hold an answer: each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).parents[1])
ANSWER = "Emoji 🎉, Zoë \ud83d"
SCRIPT = (
    f"import sys; sys.path.insert(0, {TESTS!r}); from support.fake_engine import FakeEngine, FakeEngineModule, with_budget\n"
    f"sys.modules['offload.engine'] = FakeEngineModule(FakeEngine({ANSWER!r}))\n"
    "import offload.planning, offload.what_if; offload.planning.with_budget = offload.what_if.with_budget = with_budget\n"
    "from offload.cli.main import main; main()"
)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


def run(*arguments, redirect="", encoding="utf-8", stdin=subprocess.DEVNULL):
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", SCRIPT, *map(str, arguments)]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, stdin=stdin, env=environment, timeout=60, check=False)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "Emoji 🎉, Zoë ?\n".encode()),
        ("ascii", b"Emoji ?, Zo? ?\n"),
        ("latin-1", "Emoji ?, Zoë ?\n".encode("latin-1")),
        ("ascii:backslashreplace", b"Emoji \\U0001f389, Zo\\xeb \\ud83d\n"),
    ],
)
def test_what_an_encoding_cannot_hold_is_replaced(model, encoding, text):
    for done in (run("run", model, "-p", "x", encoding=encoding), run("chat", model, encoding=encoding, stdin=hello())):
        assert (done.returncode, done.stdout, done.stderr) == (0, text, b"")


def hello():
    reading, writing = os.pipe()
    os.write(writing, b"hello\n")
    os.close(writing)
    return reading


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_is_utf8_whatever_the_encoding(model, encoding):
    done = run("run", model, "-p", "x", "--json", encoding=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode("utf-8"))["text"] == ANSWER


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "MODEL", "-p", "x"], ["chat", "MODEL"]])
def test_without_a_standard_output_there_is_one_line(model, arguments):
    words = [model if word == "MODEL" else word for word in arguments]
    done = run(*words, redirect=">&-")
    assert done.stderr == b"offload: error: standard output is closed; redirect it to /dev/null if nobody reads it\n"
    assert done.returncode == 1 and run(*words, redirect=">&- 2>&-").returncode == 1


def test_without_a_standard_error_the_answer_is_printed_and_an_error_has_its_code(model):
    done = run("run", model, "-p", "x", "--stats", redirect="2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Emoji 🎉, Zoë ?\n".encode(), b"")
    assert run("run", "absent.gguf", "-p", "x", redirect="2>&-").returncode == 2
    assert run("run", model, "-p", "x", redirect="<&- 2>&-").stdout == done.stdout
    assert run("plan", model, "--json", redirect="2>&-").returncode == 0


def test_without_a_standard_input_a_prompt_is_missing_where_none_is_given(model):
    assert run("run", model, "-p", "x", redirect="<&-").returncode == 0
    for done in (run("run", model, redirect="<&-"), run("chat", model, redirect="<&-")):
        assert done.returncode == 2 and done.stderr.startswith(b"offload: error: no ") and done.stderr.count(b"\n") == 1


def test_files_do_not_take_the_place_of_closed_streams(model):
    script = "import os; from offload.cli.streams import open_streams; open_streams(); print(os.open('.', os.O_RDONLY))"
    command = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", script]
    assert int(subprocess.run(command, capture_output=True, timeout=60, check=True).stdout) == 3
