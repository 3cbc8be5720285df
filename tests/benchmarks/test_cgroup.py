"""The harness itself: a proof under a limit is worth what its instrument is worth."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.cgroup import memory_limited

from offload.units import MIB

pytestmark = pytest.mark.cgroup
TOUCH = "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096])"


def test_memory_that_is_touched_is_counted() -> None:
    with memory_limited(300 * MIB) as group:
        run = group.run([sys.executable, "-c", TOUCH, str(128 * MIB)], timeout_s=60)
    assert (run.exit_code, run.oom_kills) == (0, 0)
    assert 128 * MIB < run.peak_bytes < 200 * MIB


def test_a_command_above_its_limit_is_killed_and_the_kill_is_counted() -> None:
    with memory_limited(64 * MIB) as group:
        run = group.run([sys.executable, "-c", TOUCH, str(256 * MIB)], timeout_s=60)
    assert run.exit_code == -9
    assert run.oom_kills == 1
    assert run.peak_bytes <= 64 * MIB


def test_page_cache_is_told_apart_from_anonymous_memory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    script = f"import pathlib, time; pathlib.Path({str(file)!r}).write_bytes(bytes({96 * MIB})); time.sleep(0.2)"
    with memory_limited(400 * MIB) as group:
        run = group.run([sys.executable, "-c", script], timeout_s=60)
    assert run.exit_code == 0
    assert run.peak_cache_bytes >= 90 * MIB
    assert run.peak_anonymous_bytes < 150 * MIB


def test_a_command_that_does_not_end_is_ended() -> None:
    with memory_limited(64 * MIB) as group:
        run = group.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.5)
    assert run.timed_out
    assert run.exit_code == -9
    assert run.wall_s < 10


def test_output_and_exit_code_come_back_and_the_group_is_gone() -> None:
    with memory_limited(64 * MIB) as group:
        run = group.run([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"], timeout_s=60)
    assert (run.exit_code, run.stdout, run.stderr) == (1, "out\n", "err\n")
    assert not group.folder.exists()
