from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from offload.detokenize import IncrementalDetokenizer


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


any_bytes = st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode))


@given(any_bytes, st.lists(st.integers(0, 60), max_size=12))
def test_pieces_add_up_to_the_whole_text(data: bytes, cuts: list[int]) -> None:
    pieces = pieces_of(data, cuts)
    detokenizer = IncrementalDetokenizer(pieces.__getitem__)
    text = "".join(detokenizer.push(index) for index in range(len(pieces)))
    assert text + detokenizer.flush() == data.decode(errors="replace")


@given(st.text(max_size=20))
def test_valid_text_never_shows_a_replacement(text: str) -> None:
    data = text.encode()
    detokenizer = IncrementalDetokenizer(lambda index: data[index : index + 1])
    shown = ""
    for index in range(len(data)):
        shown += detokenizer.push(index)
        assert text.startswith(shown)
    assert detokenizer.flush() == ""
    assert shown == text


def test_a_broken_tail_is_shown_at_the_end_and_forgotten() -> None:
    detokenizer = IncrementalDetokenizer(lambda _: b"\xf0\x9f")
    assert detokenizer.push(0) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
