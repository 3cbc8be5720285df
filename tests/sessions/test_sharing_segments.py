"""What several conversations, stores and processes share: who appends, what is written once, what goes when it is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support.computed import GEOMETRY, Computed, files, restored

from offload.errors import StorageError
from offload.sessions.catalog import ROWS
from offload.sessions.chain import Chain
from offload.sessions.eviction import Stored, order
from offload.sessions.geometry import Bytes
from offload.sessions.locking import holding
from offload.sessions.store import KVStore
from offload.units import KIB, MIB

BEGINNING = [*range(100)]


def opened(folder: Path, limit: int = 64 * MIB, **options: Callable[[], frozenset[str]]) -> KVStore:
    return KVStore(folder, GEOMETRY, limit, segment_rows=512, **options)


@pytest.mark.parametrize("same_store", [True, False])
def test_two_that_go_on_from_one_place_at_the_same_time(tmp_path: Path, same_store: bool) -> None:
    """While one is asked for its rows, the other stores its own, and a third store opens and cleans up."""
    first, second = opened(tmp_path), opened(tmp_path)
    first.extend(Chain(), BEGINNING, Computed(BEGINNING).rows)
    ours, theirs = [*BEGINNING, *([1] * 300)], [*BEGINNING, *([2] * 300)]
    our_chain, their_chain = first.find(ours), second.find(theirs)
    computed, done = Computed(ours), []

    def rows(layer: int, start: int, stop: int) -> Bytes:
        if not done and layer == 1:
            done.append(second.extend(their_chain, theirs, Computed(theirs).rows))
            opened(tmp_path).close()
        return computed.rows(layer, start, stop)

    if same_store:
        done.append(first.extend(first.find(theirs), theirs, Computed(theirs).rows))
    our_chain = first.extend(our_chain, ours, rows)
    assert computed.asked == len(BEGINNING)  # the beginning is shared
    for store in (first, second, opened(tmp_path)):
        for tokens in (ours, theirs):
            chain = store.find(tokens)
            assert restored(store, chain, tokens) == (len(tokens), "")
    assert restored(first, our_chain, ours) == (len(ours), "")


def test_the_same_tokens_behind_others_are_other_rows(tmp_path: Path) -> None:
    store, end = opened(tmp_path), [5] * 100
    first, second = [*([1] * 512), *end], [2] * 512
    store.extend(Chain(), first, Computed(first).rows)
    chain = store.extend(Chain(), second, Computed(second).rows)
    assert store.find([*second, *end]).length == 512
    longer = [*second, *end]
    chain = store.extend(chain, longer, Computed(longer).rows)
    for tokens in (first, longer):
        assert restored(store, store.find(tokens), tokens) == (len(tokens), "")


def test_turns_of_one_conversation_share_a_segment_and_restarts_do_not_begin_another(tmp_path: Path) -> None:
    tokens: list[int] = []
    for turn in range(10):
        store = opened(tmp_path)
        tokens = [*tokens, *range(turn, turn + 50)]
        computed = Computed(tokens)
        chain = store.extend(store.find(tokens), tokens, computed.rows)
        assert computed.asked == len(tokens) - 50
        assert store.statistics().written_bytes < 50 * 6 * 40 + 8 * KIB
        store.close()
    assert len(chain.links) == 1 and len(files(tmp_path)) == 3


def test_what_saved_sessions_refer_to_goes_last_and_what_is_open_never(tmp_path: Path) -> None:
    referred: set[str] = set()
    store = opened(tmp_path, 560 * KIB, referred=lambda: frozenset(referred))
    saved = [5, *range(400)]
    referred |= {link.segment for link in store.extend(Chain(), saved, Computed(saved).rows).references}
    opened_chain = store.extend(Chain(), BEGINNING, Computed(BEGINNING).rows)
    for token in range(10, 20):
        other = [token, *range(400)]
        store.extend(Chain(), other, Computed(other).rows)
        assert store.find(saved).length == len(saved)
    assert store.find([10, *range(400)]).length == 0
    kept = [store.extend(Chain(), [token, *range(400)], Computed([token, *range(400)]).rows) for token in (30, 31)]
    with pytest.raises(StorageError, match=r"do not fit beside .* in use, the limit is 560 KiB"):
        store.extend(Chain(), range(1200), Computed(range(1200)).rows)
    assert store.find(saved).length == len(saved)  # nothing went for what cannot fit
    long = [9, *range(500)]
    store.extend(Chain(), long, Computed(long).rows)
    assert store.find(saved).length == 0
    for chain in (opened_chain, *kept):
        assert restored(store, chain, chain.tokens) == (chain.length, "")


def test_another_models_rows_count_and_go(tmp_path: Path) -> None:
    other = KVStore(tmp_path, replace(GEOMETRY, kv_type="f32"), 500 * KIB, segment_rows=512)
    for token in range(3):
        tokens = [token, *range(400)]
        other.extend(Chain(), tokens, Computed(tokens).rows)
    store = opened(tmp_path, 500 * KIB)
    assert store.find([0, *range(400)]).length == 0
    held = other.find([0, *range(400)])
    store.extend(Chain(), range(400), Computed(range(400)).rows)
    assert store.statistics().nbytes <= 500 * KIB
    assert restored(other, held, held.tokens) == (401, "")
    assert min(other.find([token, *range(400)]).length for token in range(3)) == 0


def test_a_segment_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    store = opened(tmp_path, 400 * KIB)
    path = store.extend(Chain(), range(400), Computed(range(400)).rows).links[0].file.path
    record = path.with_suffix(".json")
    record.write_bytes(record.read_bytes().replace(b" 1 ", b" 2 ", 1))
    for token in range(5):
        tokens = [token + 1, *range(400)]
        store.extend(Chain(), tokens, Computed(tokens).rows)
    opened(tmp_path)
    assert path.exists() and record.exists()


def test_what_killed_writers_left_is_removed_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    store = opened(tmp_path)
    chain = store.extend(Chain(), BEGINNING, Computed(BEGINNING).rows)
    folder, segment = chain.links[0].file.path.parent, chain.links[0].record.id
    left = [
        f"{'a' * 16}{ROWS}",
        f"{'a' * 16}.lock",
        f"{'b' * 16}.lock",
        f".{segment}.json.1-abcd.partial",
        f".{'c' * 16}.json.1-ab.partial",
    ]
    theirs = ["notes.txt", f"{'a' * 15}{ROWS}", ".hidden.partial"]
    for name in (*left, *theirs):
        (folder / name).write_bytes(b"x")
    begun = f"{'d' * 16}.lock"
    with holding(folder / begun):  # of a writer that has made nothing else yet
        opened(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        begun,
        *theirs,
        *(f"{segment}{kind}" for kind in (ROWS, ".json", ".lock")),
    }


SEGMENTS = st.lists(
    st.builds(
        Stored, id=st.sampled_from("abcdefgh"), parent=st.sampled_from("abcdefghxyz"), start=st.integers(0, 1 << 20),
        num_rows=st.integers(0, 4096), nbytes=st.integers(0, 1 << 30), used_at=st.floats(0, 1e9),
    ),
    unique_by=lambda segment: segment.id,
)  # fmt: skip


@given(SEGMENTS, st.frozensets(st.sampled_from("abcdefgh")))
def test_nothing_goes_before_what_is_built_on_it(stored: list[Stored], referred: frozenset[str]) -> None:
    going = order(stored, referred, 1e9)
    assert sorted(segment.id for segment in going) == sorted(segment.id for segment in stored)
    parents = {segment.id: segment.parent for segment in stored}
    place = {segment.id: number for number, segment in enumerate(going)}

    def in_a_circle(segment: str) -> bool:
        seen = set()
        while segment in parents and segment not in seen:
            seen.add(segment)
            segment = parents[segment]
        return segment in seen

    for segment in stored:
        if segment.parent in parents and not in_a_circle(segment.id):
            assert place[segment.id] < place[segment.parent]


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"used_at": 900_000.0}, {"used_at": 100_000.0}),
        ({"start": 50_000}, {"start": 0}),
        ({"nbytes": 1000}, {"nbytes": 2000}),
        ({"num_rows": 400}, {"num_rows": 200}),
        ({"start": 0, "used_at": 999_000.0}, {"start": 50_000, "used_at": 0.0}),
    ],
)
def test_what_is_worth_more_goes_later(more: dict[str, float], less: dict[str, float]) -> None:
    def segment(name: str, facts: dict[str, float]) -> Stored:
        return replace(Stored(id=name, parent="", start=0, num_rows=300, nbytes=1000, used_at=5e5), **facts)  # type: ignore[arg-type]

    first, second = segment("a", more), segment("b", less)
    for stored in ([first, second], [second, first]):
        assert [gone.id for gone in order(stored, frozenset(), 1e6)] == ["b", "a"]
        assert [gone.id for gone in order(stored, frozenset("b"), 1e6)] == ["a", "b"]
