"""Runs a command under a hard memory limit of the kernel, control groups version 1 or 2, and reports what it used.

The kernel counts everything that the command causes, page cache included, and kills it where it cannot stay below the limit.
Nothing here knows what the command is.

    with memory_limited(parse_size("3GiB")) as group:
        run = group.run(["offload", "run", "model.gguf", "--ram", "3GiB"], timeout_s=600)
        assert run.exit_code == 0 and run.oom_kills == 0 and run.peak_bytes <= group.limit_bytes
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

MOUNT: Final = Path("/sys/fs/cgroup")
SAMPLE_S: Final = 0.02
ENTER: Final = 'echo $$ > "$0" && exec "$@"'  # the shell joins the group, then becomes the command


class CgroupUnavailable(RuntimeError):
    """This process may not create a memory control group. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitedRun:
    """What a command did under its limit.

    Attributes:
        exit_code: negative for a signal; -9 with `oom_kills` is the kernel's doing.
        peak_bytes: the kernel's own high-water mark, page cache included.
        peak_cache_bytes, peak_anonymous_bytes: highest of samples taken every 20 ms.
        limit_hits: how often the group reached its limit and the kernel had to reclaim.
    """

    exit_code: int
    timed_out: bool
    stdout: str
    stderr: str
    wall_s: float
    peak_bytes: int
    peak_cache_bytes: int
    peak_anonymous_bytes: int
    oom_kills: int
    limit_hits: int


@dataclass(frozen=True, slots=True)
class _Interface:
    """File and field names of one version."""

    limit: str
    peak: str
    cache: str
    anonymous: str
    events: str


_V1: Final = _Interface(
    "memory.limit_in_bytes", "memory.max_usage_in_bytes", "total_cache", "total_rss", "memory.oom_control"
)
_V2: Final = _Interface("memory.max", "memory.peak", "file", "anon", "memory.events")


@dataclass(slots=True)
class Group:
    """A control group with a memory limit. Peaks count from its creation, so use one group for one run."""

    folder: Path
    limit_bytes: int
    interface: _Interface
    _peaks: dict[str, int] = field(default_factory=dict)

    def run(
        self, command: Sequence[str], *, timeout_s: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> LimitedRun:
        """Runs `command` in the group to its end, or kills it after `timeout_s`."""
        start = time.perf_counter()
        entered = ["/bin/sh", "-c", ENTER, str(self.folder / "cgroup.procs"), *command]
        process = subprocess.Popen(
            entered,
            cwd=cwd,
            env=env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with self._sampling():
            try:
                stdout, stderr = process.communicate(timeout=timeout_s)
                timed_out = False
            except subprocess.TimeoutExpired:
                self.kill()
                stdout, stderr = process.communicate()
                timed_out = True
        return LimitedRun(
            exit_code=process.returncode,
            timed_out=timed_out,
            stdout=stdout,
            stderr=stderr,
            wall_s=time.perf_counter() - start,
            peak_bytes=int((self.folder / self.interface.peak).read_text(encoding="ascii")),
            peak_cache_bytes=self._peaks.get(self.interface.cache, 0),
            peak_anonymous_bytes=self._peaks.get(self.interface.anonymous, 0),
            oom_kills=_table(self.folder / self.interface.events).get("oom_kill", 0),
            limit_hits=self._limit_hits(),
        )

    def _limit_hits(self) -> int:
        if self.interface is _V1:
            return int((self.folder / "memory.failcnt").read_text(encoding="ascii"))
        return _table(self.folder / self.interface.events).get("max", 0)

    def kill(self) -> None:
        """Ends every process of the group."""
        for pid in (self.folder / "cgroup.procs").read_text(encoding="ascii").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        """Ends what still runs and removes the group. The kernel needs a moment until the last process has left."""
        for _ in range(100):
            self.kill()
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._sample, args=(stop,), name="cgroup-sampler", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(SAMPLE_S):
            now = _table(self.folder / "memory.stat")
            for name in (self.interface.cache, self.interface.anonymous):
                self._peaks[name] = max(self._peaks.get(name, 0), now.get(name, 0))


@contextmanager
def memory_limited(limit_bytes: int) -> Iterator[Group]:
    """A new group limited to `limit_bytes`, removed at the end with everything that still runs in it.

    Raises:
        CgroupUnavailable: no memory controller, or no permission.
    """
    group = _create(limit_bytes)
    try:
        yield group
    finally:
        group.remove()


def _create(limit_bytes: int) -> Group:
    refused = []
    for parent, interface in _parents():
        folder = parent / f"offload-{os.getpid()}-{time.monotonic_ns()}"
        try:
            if interface is _V2:
                (parent / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
            folder.mkdir()
            (folder / interface.limit).write_text(str(limit_bytes), encoding="ascii")
            (folder / interface.peak).read_text(encoding="ascii")
        except OSError as error:
            refused.append(f"{parent}: {error.strerror}")
            with suppress(OSError):
                folder.rmdir()
            continue
        with suppress(OSError):  # a swap device would let the group exceed its limit of memory unnoticed
            (folder / "memory.swap.max").write_text("0", encoding="ascii")
        return Group(folder, limit_bytes, interface)
    raise CgroupUnavailable(
        f"no memory control group can be created: {'; '.join(refused) or 'no memory controller is mounted'}"
    )


def _parents() -> Iterator[tuple[Path, _Interface]]:
    """Places for a new group, this process's own first, then its ancestors (version 2 allows no group below a busy one)."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines() if MOUNT.is_dir() else []:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, interface = MOUNT / "memory", _V1
        elif not controllers and "memory" in _words(MOUNT / "cgroup.controllers"):
            root, interface = MOUNT, _V2
        else:
            continue
        own = root / path.lstrip("/")
        yield from ((folder, interface) for folder in (own, *own.parents) if folder.is_relative_to(root))


def _words(path: Path) -> list[str]:
    return path.read_text(encoding="ascii").split() if path.is_file() else []


def _table(path: Path) -> dict[str, int]:
    """`name value` lines of a kernel file."""
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
