"""The chat on a real terminal: a pseudo-terminal, and a screen that obeys its escape sequences."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("pexpect")
from support.terminal import CTRL_C, CTRL_D, ROOT, Terminal

from offload.cli.chat_files import FORMAT, load_chat
from offload.cli.interrupt import signals_unwind

PROGRAM = str(ROOT / "tests" / "support" / "fake_chat.py")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(answer: str = "Paris is the capital.", token_s: float = 0.0, failure: str = "") -> Terminal:
        opened.append(Terminal(sys.executable, PROGRAM, answer, str(token_s), failure, home=tmp_path))
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


def test_notes_wrap_at_words(terminal):
    screen = terminal()
    screen.type("/help\r")
    lines = screen.wait_for("stops an answer").splitlines()
    assert "or plan" in lines and "TEXT, remove it" in lines
    screen.type("/show nothing\r")
    assert "choose one of info, parameters,\nsystem, template" in screen.wait_for("template, plan")


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(terminal):
    screen = terminal(answer="safe \x1b]0;owned\x07 \x1b[2J\x9b31m end")
    screen.type("hi\r")
    screen.wait_for("end")
    assert b"\x1b]0;owned" not in screen.raw and "safe" in screen.text()
    assert screen.screen.title != "owned"


def test_an_error_is_one_line_and_the_chat_goes_on(terminal):
    screen = terminal(failure="context")
    screen.type("hi\r")
    screen.wait_for("error: the message does not fit the context")
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
    screen.wait_for("error: cannot save the chat to /proc/nowhere")
    screen.type("/bye\r")
    assert screen.leave() == 0


def test_what_is_no_utf8_is_refused_and_the_chat_goes_on_and_is_saved(terminal, tmp_path):
    strange = tmp_path / "strange.json"
    strange.write_text(json.dumps({"format": FORMAT, "messages": [{"role": "system", "content": "\ud800!"}]}))
    screen = terminal()
    for line, words in (
        (b"caf\xe9\r", "error: the message: it is not UTF-8 text"),
        (b"/set stop caf\xe9\r", "error: stop: it is not UTF-8 text"),
        (b"/save " + bytes(tmp_path) + b"/caf\xe9.json\r", "saved to"),
        (f"/load {strange}\r".encode(), "0 messages loaded"),
        (b"/show system\r", "\n!"),
        (f"/save {tmp_path}/again.json\r".encode(), "again.json"),
        (b"hi\r", "capital."),
    ):
        screen.process.send(line)
        screen.wait_for(words)
    screen.type("/bye\r")
    assert screen.leave() == 0 and "Traceback" not in screen.text()
    assert load_chat(tmp_path / "again.json")[0] == [{"role": "system", "content": "\ud800!"}]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["prompt", "answer"])
def test_a_signal_that_ends_the_chat_leaves_the_terminal_as_it_was(terminal, number, moment):
    screen = terminal(answer="word " * 2000, token_s=0.02)
    if moment == "answer":
        screen.type("go\r")
        screen.wait_for("tok/s")
    screen.process.kill(number)
    screen.leave()
    assert screen.process.signalstatus == number
    assert screen.raw.rfind(b"\x1b[?25h") > screen.raw.rfind(b"\x1b[?25l")
    assert screen.left_cooked
    assert "Traceback" not in screen.text() and "bound by" not in screen.text()


@pytest.mark.parametrize("before", [signal.SIG_IGN, lambda number, frame: None])
def test_signals_that_somebody_handles_are_left_alone(before):
    earlier = signal.signal(signal.SIGHUP, before)
    try:
        with signals_unwind():
            assert signal.getsignal(signal.SIGHUP) is before
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is before and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_an_engine_that_closed_ends_the_chat(terminal):
    screen = terminal(failure="closed")
    screen.type("hi\r")
    assert screen.leave() == 1 and "offload: error: the engine is closed" in screen.text()
