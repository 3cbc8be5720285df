"""The timeline as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from offload.errors import StorageError
from offload.telemetry import Event
from offload.writing import beside

_HEAD: Final = b'{"traceEvents"'


def check_trace_place(path: Path) -> None:
    """Nothing but an earlier trace, or an empty file, is ever replaced.

    Raises:
        StorageError: something else is there.
    """
    path = path.resolve()
    if not path.exists():
        return
    if not path.is_file():
        raise StorageError(f"trace {path}: not a regular file; choose another place for --trace", path=str(path))
    try:
        with path.open("rb") as file:
            head = file.read(len(_HEAD))
    except OSError as error:
        raise StorageError(f"trace {path}: {error.strerror}; choose another place", path=str(path)) from None
    if head not in (b"", _HEAD):
        raise StorageError(
            f"trace {path}: the file is there and is no earlier trace; choose another place for --trace", path=str(path)
        )


def write_trace(path: Path, events: Iterable[Event]) -> None:
    """Writes complete events ("ph": "X", microseconds) with one thread a lane. A symlink's target is replaced, not the link.

    Raises:
        StorageError: the file cannot be written, or something that is no trace is there.
    """
    check_trace_place(path)
    path = path.resolve()
    lanes: dict[str, int] = {}
    rows: list[dict[str, object]] = []
    for event in events:
        lane = lanes.setdefault(event.lane, len(lanes))
        row: dict[str, object] = {
            "ph": "X", "pid": 1, "tid": lane, "name": event.name, "cat": event.lane,
            "ts": event.start_s * 1e6, "dur": (event.end_s - event.start_s) * 1e6,
        }  # fmt: skip
        if event.nbytes:
            row["args"] = {"bytes": event.nbytes}
        rows.append(row)
    names = [
        {"ph": "M", "pid": 1, "tid": lane, "name": "thread_name", "args": {"name": name}}
        for name, lane in lanes.items()
    ]
    try:
        with beside(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump({"traceEvents": [*names, *rows], "displayTimeUnit": "ms"}, file)
    except OSError as error:
        raise StorageError(
            f"trace {path}: {error.strerror}; choose another place for --trace", path=str(path)
        ) from None
