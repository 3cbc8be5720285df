"""What people see of an answer's progress and of its figures: narrow terminals, odd sizes, nothing to measure."""

import io
import re
import signal
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.fake_engine import GIB, FakeEngine

from offload.cli import bench, render
from offload.cli.interrupt import interrupt_calls
from offload.cli.progress import Bars
from offload.cli.render import LiveView, Wrapper
from offload.cli.report import resident_share, statistics_lines
from offload.cli.status import StatusLine
from offload.results import EdgeUse, TierUse

ANSWER = st.lists(st.text(st.sampled_from("ab \n漢é-🎉\x1b"), max_size=30), max_size=6)
NBYTES = st.integers(0, 2**50)
USES = st.builds(TierUse, bytes=NBYTES, hit_rate=st.just(0.5))


class Screen(io.StringIO):
    """A terminal on which everything is typed that is written to it."""

    def isatty(self):
        return True

    def lines(self, width):
        screen = pyte.Screen(width, 400)
        pyte.Stream(screen).feed(self.getvalue().replace("\n", "\r\n"))
        return [line.rstrip() for line in screen.display]


@given(ANSWER, st.integers(3, 40))
def test_an_answer_stands_whole_on_any_terminal_and_the_status_is_gone(pieces, width):
    out = Screen()
    console = Console(file=out, force_terminal=True, width=width, height=24, color_system=None)
    with pytest.MonkeyPatch.context() as patch, LiveView(console) as view:
        patch.setattr(render, "_REFRESH_S", 0.0)
        for piece in pieces:
            view.write(piece)
            view.status("STATUS " * 6)
        live = "".join(out.lines(width))
    assert not pieces or "S" in live
    written = "".join("".join(pieces).replace("\x1b", "").split())
    assert "".join("".join(out.lines(width)).split()) == written


def watched(monkeypatch, columns="60"):
    """Standard error as a terminal."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Screen())
    return sys.stderr


def appear(bars):
    """Wait until the bars of all phases have appeared, which needs no patience here."""
    for phase in list(bars._phases.values()):
        phase.appears.join()
    bars._progress.refresh()


@pytest.mark.parametrize(("done", "total", "share"), [(1, 4, "25%"), (0, 10**15, "0%"), (10**15 - 1, 10**15, "100%"),
                                                      (0, None, None), (7, None, None)])  # fmt: skip
@pytest.mark.parametrize("width", ["60", "4"])
def test_a_bar_shows_its_share_and_leaves_an_empty_screen(monkeypatch, done, total, share, width):
    terminal = watched(monkeypatch, width)
    with Bars(enabled=True, patience_s=0) as bars:
        bars.prefill(0, 10**16)
        bars.update("loading", done, total)
        appear(bars)
        shown = [re.findall(r"\d+%", line) for line in terminal.lines(60) if "loading" in line]
        assert width == "4" or shown == [[] if share is None else [share]]
    assert not any(terminal.lines(60))


def test_the_rate_of_a_status_is_of_this_answer_from_its_first_token_on(monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("offload.cli.status.time", clock)
    engine = FakeEngine()
    statistics = engine.statistics()
    monkeypatch.setattr(engine, "statistics", lambda: statistics)
    status = StatusLine(engine)
    clock.now += 90.0
    assert status.prefill(0, 0) == "reading the prompt 100% · 1 min 30 s"
    status.count(1)
    clock.now += 2.0
    status.count(5)
    statistics = replace(statistics, io={"nvme->ram": EdgeUse(bytes=3 * GIB + 4 * 10**9, busy_s=4.0)}, residency={})
    assert status.decode() == "2.5 tok/s · disk 2 GB/s · 0% resident · bound by disk"


@given(st.dictionaries(st.sampled_from(["ram", "vram", "nvme"]), USES), NBYTES)
def test_the_resident_share_is_a_share_and_the_disk_is_no_part_of_it(residency, model_bytes):
    share = resident_share(residency, model_bytes)
    assert 0 <= share <= 1
    assert share == resident_share({tier: use for tier, use in residency.items() if tier != "nvme"}, model_bytes)
    assert share == 1 or sum(use.bytes for tier, use in residency.items() if tier != "nvme") < model_bytes


def test_figures_of_an_engine_that_did_nothing_are_zeros(fake):
    nothing = {"tokens": 0, "passes": 0, "compute_s": 0.0, "wait_s": 0.0, "other_s": 0.0, "io": {}, "residency": {}}
    lines = statistics_lines(replace(fake.statistics(), **nothing), 0)
    assert lines[:2] == ["0 tokens in 0 passes, 0 ms", "computing 0%, waiting 0%, the rest 0%; bound by disk"]
    assert lines[2:] == ["100% of the weights resident, 17 tokens in the KV cache", "memory 1.00 GiB, peak 2.00 GiB"]


def test_an_interrupted_block_ends_after_what_stops_it_and_gives_the_signal_back():
    before, order, never = signal.getsignal(signal.SIGINT), [], threading.Event()

    def stop():
        never.wait(0.1)
        order.append(threading.current_thread() is threading.main_thread())

    with pytest.raises(ZeroDivisionError), interrupt_calls(lambda: order.append("outer")):  # noqa: PT012
        with interrupt_calls(stop):
            signal.raise_signal(signal.SIGINT)
        assert order == [False]
        signal.raise_signal(signal.SIGINT)
        1 / 0  # noqa: B018
    assert order == [False, "outer"] and signal.getsignal(signal.SIGINT) is before


def test_a_benchmark_is_the_median_of_the_runs_after_the_first(fake, monkeypatch):
    speeds = iter([1000.0, 5.0, 2.0, 3.0])
    generate = fake.generate

    def timed(prompt, **options):
        completion = generate(prompt, **options)
        return replace(completion, timings=replace(completion.timings, decode_tps=next(speeds)))

    monkeypatch.setattr(fake, "generate", timed)
    (row,) = bench.measure(fake, 0, 4, 3, 1.0, Bars(enabled=False))
    assert (row.test, row.tokens_per_second, row.runs) == ("tg4", 3.0, (5.0, 2.0, 3.0))
    assert all(0 <= token < 256 for prompt in fake.prompts for token in prompt)


def test_a_tab_is_as_wide_whether_it_arrives_alone_or_not():
    whole, pieces = Wrapper(20), Wrapper(20)
    whole.feed("ab\tc")
    pieces.feed("ab")
    pieces.feed("\tc")
    assert whole.rest == pieces.rest == "ab  c"
