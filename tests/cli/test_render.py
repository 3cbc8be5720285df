import io
import signal
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from support.fake_engine import FakeEngine

from offload.cli.interrupt import interrupt_calls
from offload.cli.progress import Bars, bars_wanted
from offload.cli.render import PlainView, Wrapper
from offload.cli.status import StatusLine
from offload.cli.text import printable

TEXT = st.text(st.sampled_from("ab \n漢é-"), max_size=80)


@given(st.lists(TEXT, max_size=6), st.integers(2, 20))
def test_wrapping_keeps_every_character_but_spaces_at_breaks(pieces, width):
    wrapper = Wrapper(width)
    lines = [line for piece in pieces for line in wrapper.feed(piece)] + [wrapper.rest]
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join("".join(pieces).split())


@given(TEXT, st.integers(2, 20))
def test_wrapping_does_not_depend_on_how_the_text_arrives(text, width):
    whole, single = Wrapper(width), Wrapper(width)
    expected = [*whole.feed(text), whole.rest]
    found = [line for character in text for line in single.feed(character)] + [single.rest]
    assert [line.rstrip() for line in found] == [line.rstrip() for line in expected]


def test_words_stay_whole_where_they_fit():
    wrapper = Wrapper(10)
    assert wrapper.feed("one two three four") == ["one two"] and wrapper.rest == "three four"
    assert wrapper.feed("\n") == ["three four"] and wrapper.rest == ""


def test_only_line_feed_and_tab_survive_of_all_controls():
    everything = "".join(map(chr, range(0x100)))
    left = printable(everything)
    assert {c for c in left if ord(c) < 32 or 0x7F <= ord(c) < 0xA0} == {"\n", "\t"}
    assert len(left) == 256 - 30 - 33


def test_plain_view_passes_the_text_through():
    out = io.StringIO()
    with PlainView(out) as view:
        view.write("a\x1b")
        view.status("never seen")
    assert out.getvalue() == "a\x1b\n"


def test_bars_wait_for_their_patience_and_vanish(capsys):
    with Bars(enabled=True, patience_s=3600) as bars:
        bars.update("loading", 1, 2)
        bars.update("loading", 2, 2)
        assert bars._progress is None
    with Bars(enabled=True, patience_s=0.01) as bars:
        bars.update("loading", 0, None)
        eventually(lambda: bars._progress is not None)  # nobody has to report again for that
        bars.update("loading", 1, 2)
        assert bars._progress.tasks[0].completed == 1
        bars.end("loading")
        assert bars._progress.tasks == []
        bars.stop()
        assert bars._progress is None
    assert capsys.readouterr().out == ""


def test_a_bar_whose_phase_ended_in_time_never_appears():
    with Bars(enabled=True, patience_s=0.05) as bars:
        bars.update("loading", 0, 2)
        bars.update("loading", 2, 2)
        time.sleep(0.2)
        assert bars._progress is None


def eventually(happened):
    deadline = time.monotonic() + 5
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_bars_are_not_wanted_without_a_terminal_or_when_told(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")  # about colour only
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert not bars_wanted()
    monkeypatch.setattr("sys.stderr", Screen())
    assert bars_wanted() and not bars_wanted(quiet=True)
    monkeypatch.setenv("TERM", "dumb")
    assert not bars_wanted()


def test_status_line_counts_this_answer_alone():
    status = StatusLine(FakeEngine())
    assert status.prefill(1, 4).startswith("reading the prompt 25%")
    assert status.decode().startswith("first token")
    status.count(1)
    status.count(1)
    assert "tok/s" in status.decode() and "GB/s" not in status.decode()


def test_first_interrupt_stops_and_second_raises():
    stopped = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    with interrupt_calls(stopped.set):
        signal.raise_signal(signal.SIGINT)
        assert stopped.wait(5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_off_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with interrupt_calls(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
