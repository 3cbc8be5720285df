"""Sizes, rates and times: what is accepted, what is printed, and that the two agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import UsageError
from offload.units import (
    GIB,
    KIB,
    MIB,
    PAGE,
    align_down,
    align_up,
    format_duration,
    format_rate,
    format_size,
    parse_size,
)

nonnegative = st.integers(min_value=0, max_value=2**60)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("3GiB", 3 * GIB),
        ("3G", 3 * GIB),
        ("3GB", 3 * GIB),
        ("3gib", 3 * GIB),
        ("3000M", 3000 * MIB),
        ("512k", 512 * KIB),
        ("1.5 GiB", 3 * GIB // 2),
        (".5G", GIB // 2),
        ("2.", 2),
        (" 17 ", 17),
        ("17B", 17),
        ("1T", 1024 * GIB),
        (0, 0),
        (4096, 4096),
    ],
)
def test_parse_size_reads_what_people_write(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "3X", "-3G", "3 G B", "3GiBs", "1e9", "0x10", "nan", "inf", "3,5G", "٣x", "."]
)
def test_parse_size_refuses_everything_else(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


def test_parse_size_refuses_negative_numbers_and_truth_values() -> None:
    with pytest.raises(UsageError, match="cannot be negative"):
        parse_size(-1)
    with pytest.raises(UsageError):
        parse_size(True)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10 * KIB, "10.0 KiB"),
        (312 * MIB, "312 MiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (5000 * GIB, "4.88 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format_size_has_three_significant_figures(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(nonnegative)
def test_a_printed_size_reads_back_within_its_precision(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.006, abs=0.5)


@given(nonnegative)
def test_a_printed_size_never_needs_five_digits(nbytes: int) -> None:
    number = format_size(min(nbytes, 1000 * 1024 * GIB)).split()[0]
    assert len(number.replace(".", "")) <= 4


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0, "0 B/s"), (999, "999 B/s"), (1500, "1.5 kB/s"), (2.5e6, "2.5 MB/s"), (1.434e9, "1.43 GB/s")],
)
def test_format_rate_is_decimal(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0854, "85 ms"), (4.21, "4.2 s"), (190, "3 min 10 s"), (7500, "2 h 05 min"), (3599.7, "1 h 00 min")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(nonnegative, st.sampled_from([1, 512, PAGE, MIB]))
def test_alignment_encloses_the_value_by_less_than_one_step(value: int, step: int) -> None:
    low, high = align_down(value, step), align_up(value, step)
    assert low % step == high % step == 0
    assert low <= value <= high
    assert value - low < step
    assert high - value < step
