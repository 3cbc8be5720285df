"""Killed at any instant, and two processes at once: every session is the last committed turn or the one before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.computed import files

TESTS = Path(__file__).parents[1]
KILLS = int(os.environ.get("OFFLOAD_TEST_KILLS", "200"))
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def started(*words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, env=environment, cwd=TESTS, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_chat_that_is_killed_again_and_again(tmp_path: Path) -> None:
    process = started("-m", "support.chatting", tmp_path, KILLS, 1)
    output, _ = process.communicate(timeout=60 + KILLS)
    assert process.returncode == 0, output
    kills, turns = (int(word) for word in output.split() if word.isdigit())
    assert kills == KILLS
    assert turns > KILLS / 50  # not all were killed before they had begun, however slow the machine


CHATS = """
import sys, os
from pathlib import Path
from support.chatting import chat, check
folder, seed, turns = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
import support.chatting as chatting
chatting.NAMES = (f"even-{seed}", f"odd-{seed}")
chat(folder, 0, seed, os.open(os.devnull, os.O_WRONLY), last=turns)
"""
CHECKS = """
import sys
from pathlib import Path
import support.chatting as chatting
folder, turns = Path(sys.argv[1]), int(sys.argv[2])
sessions, store = chatting.opened(folder)
assert sessions.names() == ["even-1", "even-2", "odd-1", "odd-2"]
for name in sessions.names():
    session = sessions.load(name)
    chatting.NAMES = tuple(f"{part}-{name[-1]}" for part in ("even", "odd"))
    assert (name, list(session.tokens)) == chatting.tokens_after(chatting.turn_of(session), int(name[-1]))
    assert chatting.turn_of(session) in (turns - 1, turns)
    chain = store.find(session.tokens)
    assert chatting.restored(store, chain, session.tokens).positions == chain.length
"""


def test_two_processes_on_one_store(tmp_path: Path) -> None:
    """The limit is so small that each has to evict what is not in use, of the other as well."""
    both = [started("-c", CHATS, tmp_path, seed, 60) for seed in (1, 2)]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    process = started("-c", CHECKS, tmp_path, 60)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert not [path for path in files(tmp_path) if path.suffix == ".partial"]
