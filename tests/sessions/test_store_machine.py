"""The store against a plain model: a set of sequences that were stored. Rows tell which tokens they were computed from."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.computed import GEOMETRY, Computed, files, restored

from offload.errors import StorageError
from offload.sessions.chain import Chain
from offload.sessions.geometry import num_common, token_ids
from offload.sessions.store import KVStore
from offload.units import KIB, MIB

NAMES = st.sampled_from("abcd")
TURN = st.tuples(st.integers(0, 2), st.sampled_from([1, 5, 100, 255, 256, 257, 700]))


def turn(drawn: tuple[int, int]) -> list[int]:
    """Few different ones, so that conversations share beginnings."""
    token, count = drawn
    return [token + i % 7 for i in range(count)]


class Machine(RuleBasedStateMachine):
    """Conversations in one or two stores (as of two processes) on a folder. A chain of each is held as long as its store."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.stored: set[tuple[int, ...]] = set()
        self.tokens: dict[str, list[int]] = {name: [] for name in "abcd"}
        self.lossy = False  # something was evicted or damaged: stored sequences may be found in part
        self.damaged = False  # what is held may have been lost as well

    @initialize(limit=st.sampled_from([300 * KIB, MIB, 64 * MIB]), rows=st.sampled_from([256, 1024]))
    def start(self, limit: int, rows: int) -> None:
        self.limit, self.rows = limit, rows
        self.lossy = limit < 64 * MIB
        self.stores = [self.opened(), self.opened()]
        self.chains = dict.fromkeys("abcd", Chain())

    def opened(self) -> KVStore:
        return KVStore(self.folder / "kv", GEOMETRY, self.limit, segment_rows=self.rows)

    def store(self, name: str) -> KVStore:
        return self.stores[name in "cd"]

    @rule(name=NAMES, drawn=TURN, looks=st.booleans())
    def extend(self, name: str, drawn: tuple[int, int], looks: bool) -> None:
        tokens, chain = self.tokens[name] + turn(drawn), self.chains[name]
        computed = Computed(tokens)
        if looks:
            chain = self.store(name).find(tokens)
        common = num_common(chain.tokens, token_ids(tokens))
        try:
            chain = self.store(name).extend(chain, tokens, computed.rows)
        except StorageError as error:
            assert "do not fit" in str(error) and "\n" not in str(error)
            assert self.lossy
            return
        assert chain.length == len(tokens)
        assert computed.asked >= common or self.damaged  # what is shared is not written again
        assert list(chain.tokens) == tokens
        self.tokens[name], self.chains[name] = tokens, chain
        self.stored.add(tuple(tokens))
        assert self.store(name).statistics().nbytes <= self.limit

    @rule(name=NAMES, share=st.floats(0, 1))
    def edit(self, name: str, share: float) -> None:
        """Tokens are taken back; the chain stays, and the next turn may diverge from it."""
        self.tokens[name] = self.tokens[name][: int(len(self.tokens[name]) * share)]

    @rule(name=NAMES, other=NAMES)
    def fork(self, name: str, other: str) -> None:
        if (name in "cd") == (other in "cd"):
            self.tokens[name], self.chains[name] = list(self.tokens[other]), self.chains[other]

    @rule(name=NAMES)
    def close_conversation(self, name: str) -> None:
        self.tokens[name], self.chains[name] = [], Chain()

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.stores[which].close()
        self.stores[which] = self.opened()
        for name in "cd" if which else "ab":
            self.chains[name] = self.stores[which].find(self.tokens[name])

    @rule(name=NAMES, drawn=TURN)
    def find(self, name: str, drawn: tuple[int, int]) -> None:
        tokens = self.tokens[name] + turn(drawn)
        ids = token_ids(tokens)
        chain = self.store(name).find(tokens)
        known = max((num_common(token_ids(stored), ids) for stored in self.stored), default=0)
        assert chain.length == known or (self.lossy and chain.length < known)
        assert list(chain.tokens) == tokens[: chain.length]
        assert restored(self.store(name), chain, tokens).positions == chain.length or self.damaged

    @precondition(lambda self: self.stored)
    @rule(which=st.integers(0, 1 << 20), place=st.integers(0, 1 << 30), value=st.integers(1, 255))
    def damage(self, which: int, place: int, value: int) -> None:
        """A byte of any file, most often where rows are."""
        paths = [path for path in files(self.folder) if path.stat().st_size]
        path = paths[which % len(paths)]
        with path.open("r+b") as file:
            place %= path.stat().st_size
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ value]))
        self.lossy = self.damaged = True

    @invariant()
    def chains_hold_what_they_say(self) -> None:
        for name, chain in getattr(self, "chains", {}).items():
            tokens = [int(token) for token in chain.tokens]
            sound = restored(self.store(name), chain, tokens).positions
            if sound < chain.length:
                assert self.damaged
                self.chains[name] = chain.upto(sound)

    def teardown(self) -> None:
        for store in getattr(self, "stores", []):
            store.close()
        shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
