from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload.stopping import StopMatcher

letters = st.text(alphabet="ab\n", max_size=14)
stop_strings = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Grow the text character by character; it stops as soon as it ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - len(max(ending, key=len))], True
    return text, False


@given(st.lists(letters, max_size=8), stop_strings)
def test_agrees_with_the_naive_reference(chunks: list[str], stops: list[str]) -> None:
    matcher, shown, stopped = StopMatcher(stops), "", False
    for chunk in chunks:
        piece, stopped = matcher.push(chunk)
        shown += piece
    shown += matcher.flush()
    assert (shown, stopped) == reference("".join(chunks), stops)


@given(st.lists(letters, max_size=8), stop_strings)
def test_holds_back_only_what_may_become_a_stop_string(chunks: list[str], stops: list[str]) -> None:
    matcher, shown, fed = StopMatcher(stops), "", ""
    for chunk in chunks:
        piece, stopped = matcher.push(chunk)
        shown, fed = shown + piece, fed + chunk
        held = fed[len(shown) :]
        assert stopped or not held or any(stop.startswith(held) for stop in stops)


@given(letters, stop_strings)
def test_one_character_at_a_time(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(character)[0] for character in text) + matcher.flush()
    assert shown == reference(text, stops)[0]


def test_all_but_the_last_character_of_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["ab"])
    assert [matcher.push(character) for character in "aab"] == [("", False), ("a", False), ("", True)]


def test_a_stop_string_across_chunks_is_not_shown() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("the end\n") == ("the end", False)
    assert matcher.push("\nUs") == ("", False)
    assert matcher.push("er: hi") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_no_stop_strings_hold_nothing_back() -> None:
    assert StopMatcher([]).push("abc") == ("abc", False)
