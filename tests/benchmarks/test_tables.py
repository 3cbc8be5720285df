"""The arithmetic of result files: tables, medians and ratios of rounds, and where the time of a token goes."""

from __future__ import annotations

from statistics import median
from typing import Any

import compare
import overhead
import pytest
from harness.cgroup import LimitedRun
from harness.peers import Outcome
from harness.results import table
from hypothesis import given
from hypothesis import strategies as st

from offload.units import GIB

WORDS = st.text("ab -.%", min_size=1, max_size=5).map(str.strip)
FAILED = {"exit_code": 1, "stderr": "a|b\nlast\n"}


def outcome(figures: dict[str, Any] | None = None, **run: Any) -> Outcome:
    """One run; without figures a failed one."""
    usual = {"exit_code": 0, "timed_out": False, "stdout": "", "stderr": "", "wall_s": 1.0, "peak_bytes": GIB}
    counted = {"peak_cache_bytes": 0, "peak_anonymous_bytes": 0, "oom_kills": 0, "limit_hits": 3}
    return Outcome(figures=figures or {}, run=LimitedRun(**(usual | counted | run)))


def figures(decode_tps: float, tokens: tuple[int, ...] = (1, 2, 3), read_bps: float = 1e9) -> dict[str, Any]:
    seconds = {"compute_s": 1.0, "wait_s": 2.5, "other_s": 0.5}
    speeds = {"prefill_tps": 10 * decode_tps, "decode_tps": decode_tps, "predicted_tps": 2.0}
    io = {"nvme->ram": {"bandwidth_bps": read_bps}}
    return {
        **speeds,
        "tokens": list(tokens),
        "io": io,
        "streamed_bytes": 2 * 10**8,
        "statistics": seconds,
        "experts": None,
    }


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(WORDS, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_a_table_holds_every_cell_in_its_place(rows: list[list[str]]) -> None:
    header, rule, *lines = [line.strip("|").split("|") for line in table(rows[0], rows[1:]).split("\n")]
    assert [[cell.strip() for cell in line] for line in (header, *lines)] == rows
    assert [cell.strip() for cell in rule] == ["---"] * len(header)


@given(st.lists(st.floats(0.5, 50), min_size=1, max_size=5), st.lists(st.floats(0.5, 50), min_size=1, max_size=5))
def test_a_row_has_medians_and_the_ratio_of_medians(theirs: list[float], ours: list[float]) -> None:
    peer, own = [outcome(figures(tps)) for tps in theirs], [outcome(figures(tps)) for tps in ours]
    row = dict(zip(compare.HEADER[4:], compare.Series(3 * GIB, peer, own, [2e9, 4e9, 9e9]).row()[4:], strict=True))
    assert (row["decode peer"], row["ours"]) == (f"{median(theirs):.3g}", f"{median(ours):.3g}")
    assert row["**ratio**"] == f"{median(ours) / median(theirs):.2f}x"
    assert (row["read rate"], row["of disk"]) == ("1 GB/s", "25%") and row["other"] == "12.5%"
    assert float(row["share of limit"].rstrip("%")) == pytest.approx(5 * median(ours), abs=0.501)


def test_a_row_tells_what_became_of_experts() -> None:
    use = {"hit_rate": 0.345, "fetched_ahead": 40, "used_ahead": 30}
    runs = [outcome(figures(2.0) | {"experts": use}), outcome(**FAILED)]
    cells = dict(zip(compare.HEADER, compare.Series(0, [outcome(figures(1.0))], runs, [2e9]).row(), strict=True))
    assert (cells["experts hit"], cells["guesses right"]) == ("34.5%", "75%")
    dense = compare.Series(0, [outcome(figures(1.0))], [outcome(figures(1.0))], [2e9])
    assert dense.experts() == ["-", "-"]


def test_a_row_says_why_there_is_no_figure_and_the_largest_peak() -> None:
    peer = [outcome(**FAILED), outcome(**FAILED, peak_bytes=2 * GIB)]
    row = compare.Series(0, peer, [outcome(figures(2.0)), outcome(figures(4.0))], [2e9]).row()
    cells = dict(zip(compare.HEADER, row, strict=True))
    assert (cells["limit"], cells["prefill peer"]) == ("none", "exit 1: a/b last")
    assert (cells["ratio"], cells["**ratio**"]) == ("-", "-")
    assert (cells["peak peer"], cells["peak ours"], cells["same tokens"]) == ("2.00 GiB", "1.00 GiB", "-")
    both = dict(zip(compare.HEADER, compare.Series(0, peer, peer, [2e9]).row(), strict=True))
    assert [both[name] for name in ("read rate", "of disk", "share of limit")] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("ours", "said"), [((1, 2, 3), "3 of 3"), ((1, 9, 3), "1 of 3"), ((1, 2, 3, 4), "3 of 3"), ((9,), "0 of 1")]
)
def test_tokens_are_the_same_up_to_the_first_that_differs(ours: tuple[int, ...], said: str) -> None:
    assert compare.Series(0, [outcome(figures(1.0))], [outcome(figures(1.0, ours))]).agreement() == said


PASS = st.tuples(st.integers(0, 500), st.integers(1, 900), st.integers(0, 90))


@given(st.lists(PASS, min_size=2, max_size=9), st.randoms())
def test_the_time_of_a_token_is_kernels_waits_and_the_rest(passes: list[tuple[int, int, int]], order: Any) -> None:
    """Each pass waits, computes two stages, and has gaps; the first one is the prompt."""
    events: list[dict[str, Any]] = [{"name": "thread_name", "ph": "M"}]
    now = 7_000
    for wait, kernel, gap in passes:
        events.append({"cat": "compute", "name": "blk.0", "ts": now, "dur": kernel})
        events.append({"cat": "wait", "name": "blk.1", "ts": now + kernel, "dur": wait})
        events.append({"cat": "compute", "name": "head.0", "ts": now + kernel + wait, "dur": kernel})
        now += 2 * kernel + wait + gap
    order.shuffle(events)
    tokens, *times, share = overhead.cells(events)
    count = len(passes) - 1
    kernels = sum(2 * kernel for _, kernel, _ in passes[1:]) / count
    waits = sum(wait for wait, _, _ in passes[1:]) / count
    rest = sum(gap for _, _, gap in passes[1:-1]) / count
    expected = [kernels + waits + rest, kernels, waits, rest]
    assert tokens == str(count)
    assert [1000 * float(time.removesuffix(" ms")) for time in times] == pytest.approx(expected, abs=5.1)
    assert float(share.rstrip("%")) == pytest.approx(100 * rest / expected[0], abs=0.051)
