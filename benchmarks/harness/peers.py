"""Runs one peer under a memory limit with a cold page cache, and reads the line it prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from harness.cgroup import LimitedRun, memory_limited
from harness.results import ROOT

PEERS: Final = {
    "llama.cpp": ("llama_cpp_decode.py", "--no-repack"),
    "llama.cpp-repack": ("llama_cpp_decode.py",),
    "accelerate": ("accelerate_disk.py",),
    "offload": ("offload_decode.py",),
}
DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Figures of one run (the peer's JSON), empty when it failed, and what the kernel counted."""

    figures: Mapping[str, Any]
    run: LimitedRun

    @property
    def failure(self) -> str:
        """Why there are no figures; empty when there are."""
        if self.figures:
            return ""
        if self.run.timed_out:
            return "time-out"
        return "killed" if self.run.oom_kills else f"exit {self.run.exit_code}: {self.run.stderr.strip()[-200:]}"


def drop_page_cache() -> None:
    """Forgets clean file pages of the whole machine. Needs root: a benchmark with a warm cache would mean nothing."""
    os.sync()
    DROP_CACHES.write_text("3", encoding="ascii")


def run_peer(
    peer: str, model: Path, *, limit_bytes: int, prompt_tokens: int, tokens: int, ctx: int, timeout_s: float,
    warm_up: int = 0,
) -> Outcome:  # fmt: skip
    """Runs `peer` on `model` in a group of `limit_bytes`; 0 stands for the whole machine and no budget."""
    name, *options = PEERS[peer]
    script = ROOT / "benchmarks" / "peers" / name
    sizes = {"--prompt-tokens": prompt_tokens, "--tokens": tokens, "--ctx": ctx, "--memory": limit_bytes}
    sizes["--warm-up"] = warm_up
    flags = [text for name, size in sizes.items() for text in (name, str(size))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    drop_page_cache()
    with memory_limited(limit_bytes or psutil.virtual_memory().total) as group:
        run = group.run(
            [sys.executable, str(script), str(model), *options, *flags], timeout_s=timeout_s, env=environment
        )
    lines = [line for line in run.stdout.splitlines() if line.startswith('{"peer"')]
    return Outcome(figures=json.loads(lines[-1]) if run.exit_code == 0 and lines else {}, run=run)
