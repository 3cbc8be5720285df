"""The chat on a real terminal: a pseudo-terminal, and a screen that obeys its escape sequences."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest

pexpect = pytest.importorskip("pexpect")
ROOT = Path(__file__).parents[2]
COLUMNS, ROWS = 60, 24
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """What a person would see of a program."""

    def __init__(self, *arguments: str, home: Path) -> None:
        environment = os.environ | {
            "TERM": "xterm-256color",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "XDG_STATE_HOME": str(home),
            "XDG_DATA_HOME": str(home),
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        self.screen = pyte.HistoryScreen(COLUMNS, ROWS, history=10_000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        command = [str(ROOT / "tests" / "support" / "fake_chat.py"), *arguments]
        self.process = pexpect.spawn(sys.executable, command, env=environment, dimensions=(ROWS, COLUMNS), timeout=20)

    def text(self) -> str:
        """History and screen, lines without their trailing blanks."""
        above = ["".join(line[column].data for column in range(COLUMNS)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    def wait_for(self, words: str, seconds: float = 20.0) -> str:
        deadline = time.monotonic() + seconds
        while words not in self.text():
            assert time.monotonic() < deadline, f"{words!r} never came:\n{self.text()}"
            self._pump()
        return self.text()

    def type(self, keys: str) -> None:
        self.process.send(keys)

    def leave(self) -> int:
        """Feed the rest of the output and return the exit code."""
        deadline = time.monotonic() + 20
        while self.process.isalive() and time.monotonic() < deadline:
            self._pump()
        self._pump()
        self.process.close()
        return int(self.process.exitstatus)

    def _pump(self) -> None:
        try:
            data = self.process.read_nonblocking(65536, timeout=0.05)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        self.raw += data
        self._stream.feed(data)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[object]:
    opened: list[Terminal] = []

    def start(answer: str = "Paris is the capital.", token_s: float = 0.0, failure: str = "") -> Terminal:
        opened.append(Terminal(answer, str(token_s), failure, home=tmp_path))
        opened[-1].wait_for(">>>")
        return opened[-1]

    yield start
    for one in opened:
        one.process.close(force=True)


def test_an_answer_is_shown_and_ctrl_d_leaves(terminal):
    screen = terminal()
    assert "Ask something, or /help" in screen.wait_for("Ask something")
    screen.type("hi\r")
    screen.wait_for("Paris is the capital.")
    screen.type(CTRL_D)
    assert screen.leave() == 0 and "asked ['hi']" in screen.text()


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(terminal):
    screen = terminal(answer="word " * 500, token_s=0.02)
    screen.type("go\r")
    screen.wait_for("word word")
    screen.type(CTRL_C)
    screen.wait_for("(stopped)")
    screen.type("again\r")
    screen.wait_for("tok/s")
    screen.type(CTRL_C)
    time.sleep(0.1)
    screen.type("/bye\r")
    assert screen.leave() == 0
    assert "asked ['go', 'again']" in screen.text() and "Traceback" not in screen.text()


def test_ctrl_c_on_the_empty_prompt_tells_how_to_leave(terminal):
    screen = terminal()
    screen.type(CTRL_C)
    assert "Ctrl-D, or /bye" in screen.wait_for("To leave")
    screen.type("draft" + CTRL_C)
    screen.type("/bye\r")
    assert screen.leave() == 0 and "asked []" in screen.text()


def test_the_status_line_is_live_and_gone_afterwards(terminal):
    screen = terminal(answer="a b c d e f g h i j k l m n o p", token_s=0.06)
    screen.type("hi\r")
    live = screen.wait_for("tok/s")
    assert "25% resident" in live and "bound by disk" in live
    screen.wait_for("n o p")
    screen.type("/bye\r")
    assert screen.leave() == 0 and "bound by" not in screen.text()


def test_triple_quotes_and_pasted_lines_are_one_message(terminal):
    screen = terminal()
    screen.type('"""one\r')
    screen.wait_for('"""one')
    screen.type('two"""\r')
    screen.wait_for("capital.")
    screen.type("\x1b[200~three\nfour\x1b[201~\r")
    time.sleep(0.3)
    screen.type("/bye\r")
    assert screen.leave() == 0 and r"asked ['one\ntwo', 'three\nfour']" in screen.text()


def test_long_answers_wrap_at_words_and_lose_none(terminal):
    words = [f"word{number}" for number in range(300)]
    screen = terminal(answer=" ".join(words))
    screen.type("hi\r")
    screen.wait_for("word299")
    screen.type("/bye\r")
    assert screen.leave() == 0
    assert [word for word in screen.text().split() if word.startswith("word")] == words


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(terminal):
    screen = terminal(answer="safe \x1b]0;owned\x07 \x1b[2J\x9b31m end")
    screen.type("hi\r")
    screen.wait_for("end")
    assert b"\x1b]0;owned" not in screen.raw and "safe" in screen.text()
    assert screen.screen.title != "owned"


def test_an_error_is_one_line_and_the_chat_goes_on(terminal):
    screen = terminal(failure="context")
    screen.type("hi\r")
    screen.wait_for("error: prompt has 9000 tokens")
    screen.type("/show\r")
    screen.wait_for("fake-135M: 4.00 GiB")
    screen.type("/bye\r")
    assert screen.leave() == 0 and "Traceback" not in screen.text()


def test_typed_lines_are_remembered_privately(terminal, tmp_path):
    screen = terminal()
    screen.type("first question\r")
    screen.wait_for("capital.")
    screen.type("/bye\r")
    assert screen.leave() == 0
    history = tmp_path / "offload" / "history"
    assert "+first question" in history.read_text() and history.stat().st_mode & 0o777 == 0o600
    again = terminal()
    again.type("\x1b[A\x1b[A")  # two lines back: /bye, then the question
    again.wait_for(">>> first question")


def test_a_history_that_cannot_be_kept_does_not_end_the_chat(terminal, tmp_path):
    (tmp_path / "offload").write_text("a file where the folder should be")
    screen = terminal()
    screen.wait_for("history is not kept")
    screen.type("hi\r")
    screen.wait_for("capital.")
    screen.type("/bye\r")
    assert screen.leave() == 0


def test_a_failed_save_is_one_line_and_the_chat_goes_on(terminal):
    screen = terminal()
    screen.type("hi\r")
    screen.wait_for("capital.")
    screen.type("/save /proc/nowhere/chat.json\r")
    screen.wait_for("error: cannot save the chat")
    screen.type("/bye\r")
    assert screen.leave() == 0
