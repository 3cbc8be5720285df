"""How much memory this process may still take: the machine's, under the limits of its control groups (v1 and v2).

Reads small kernel files; remembers nothing. On systems without control groups only the machine counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

MOUNT: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")
UNLIMITED: Final = 2**60  # version 1 writes "none" as the largest page-aligned int64


@dataclass(frozen=True, slots=True)
class _Names:
    """File names of one version of the interface."""

    limit: str
    usage: str
    cache: tuple[str, ...]


_V1: Final = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2: Final = _Names("memory.max", "memory.current", ("active_file", "inactive_file"))


def memory_limit(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """The tightest memory limit in bytes over this process's groups and their parents; None when there is none."""
    limits = [limit for folder, names in _groups(mount, membership) if (limit := _limit(folder, names)) is not None]
    return min(limits, default=None)


def available_memory(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process can still touch before the kernel must kill something. Droppable page cache counts as free."""
    available = psutil.virtual_memory().available
    for folder, names in _groups(mount, membership):
        limit = _limit(folder, names)
        if limit is not None:
            available = min(available, limit - _used(folder, names))
    return max(available, 0)


def _groups(mount: Path, membership: Path) -> Iterator[tuple[Path, _Names]]:
    """Folders of the process's memory groups, leaf first. Inside a container the leaf may be invisible; parents are not."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            yield from ((folder, _V2) for folder in _ancestry(mount, name))
        elif "memory" in controllers.split(","):
            yield from ((folder, _V1) for folder in _ancestry(mount / "memory", name))


def _ancestry(root: Path, name: str) -> Iterator[Path]:
    relative = Path(name.lstrip("/"))
    if ".." not in relative.parts:  # a group outside of this namespace has no folder here
        for part in (relative, *relative.parents):
            if part != Path():
                yield root / part
    yield root


def _limit(folder: Path, names: _Names) -> int | None:
    value = _read_integer(folder / names.limit)
    return value if value is not None and value < UNLIMITED else None


def _used(folder: Path, names: _Names) -> int:
    cache = 0
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            cache += int(value) if key in names.cache else 0
    except OSError:
        pass
    return max((_read_integer(folder / names.usage) or 0) - cache, 0)


def _read_integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # missing, or "max"
        return None
