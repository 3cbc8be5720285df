"""Processes that chat and save, to be killed: `python -m support.chatting FOLDER KILLS SEED`.

Each turn extends, edits or forks one of two sessions, decided by the turn's number alone. A child tells each turn that it
has saved. Whatever is on disk afterwards must be that turn, or the one that was under way.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from support.computed import GEOMETRY, Computed, restored

from offload.sessions.geometry import token_ids
from offload.sessions.manifest import Session
from offload.sessions.saved import Sessions
from offload.sessions.store import KVStore
from offload.units import MIB

NAMES = ("even", "odd")
LIMIT = 4 * MIB


def tokens_after(turn: int, seed: int) -> tuple[str, list[int]]:
    """Which session a turn changes, and what it then holds: a sum of earlier turns, some of them taken back."""
    name = NAMES[turn % 2]
    tokens = [7] * 300  # what both begin with
    for earlier in range(turn % 2, turn + 1, 2):
        chance = random.Random(1000 * seed + earlier)
        if chance.random() < 0.3:
            del tokens[chance.randrange(len(tokens)) :]
        tokens += [chance.randrange(100) for _ in range(chance.choice([1, 20, 300]))]
    return name, tokens[:2000]


def opened(folder: Path) -> tuple[Sessions, KVStore]:
    sessions = Sessions(folder / "sessions")
    return sessions, KVStore(folder / "kv", GEOMETRY, LIMIT, referred=sessions.segments, segment_rows=512)


def turn_of(session: Session) -> int:
    return int(session.messages[0]["content"])


def chat(folder: Path, first: int, seed: int, told: int, last: int | None = None) -> None:
    """Turns from `first` on, without end; each number is told when its session is saved."""
    sessions, store = opened(folder)
    known = {name: sessions.load(name) for name in sessions.names()}
    turn = first
    while last is None or turn <= last:
        name, tokens = tokens_after(turn, seed)
        chain = store.extend(store.find(tokens), tokens, Computed(tokens).rows)
        session = known.get(name) or Session(name=name, model="m", fingerprint=GEOMETRY.fingerprint)
        known[name] = sessions.save(
            Session(
                name=name, model="m", fingerprint=GEOMETRY.fingerprint, tokens=token_ids(tokens),
                messages=({"role": "user", "content": str(turn)},), references=chain.references,
                created=session.created, revision=session.revision,
            )
        )  # fmt: skip
        os.write(told, b"%d\n" % turn)
        turn += 1


def check(folder: Path, last: int, seed: int) -> int:
    """Asserts that both sessions are whole, and at the last turn that was told or one later. Returns the last turn saved."""
    sessions, store = opened(folder)
    found = {name: sessions.load(name) for name in sessions.names()}
    newest = max([-1, *map(turn_of, found.values())])
    assert newest in (last, last + 1), (newest, last)
    for turn in range(max(0, newest - 1), newest + 1):
        name, tokens = tokens_after(turn, seed)
        session = found[name]
        assert turn_of(session) == turn, (name, turn)
        assert list(session.tokens) == tokens
        chain = store.find(session.tokens)
        assert chain.length == len(tokens), (turn, chain.length, len(tokens))  # rows are durable before the session is
        assert restored(store, chain, tokens).positions == chain.length
    store.close()
    return newest


def kill_one(folder: Path, first: int, seed: int, seconds: float) -> int:
    """Starts a child and kills it; returns the last turn that it told, or the one before its first."""
    source, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            chat(folder, first, seed, told)
        finally:
            os._exit(1)
    os.close(told)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    with os.fdopen(source, "rb") as pipe:
        lines = pipe.read().splitlines()
    return int(lines[-1]) if lines else first - 1


def main(folder: Path, kills: int, seed: int) -> None:
    chance, last = random.Random(seed), -1
    for _ in range(kills):
        told = kill_one(folder, last + 1, seed, chance.uniform(0, 0.05))
        last = check(folder, told, seed)
    left = [path.name for path in (folder / "kv").rglob("*") if path.suffix == ".partial"]
    assert not left, left
    print(f"{kills} kills, {last + 1} turns")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
