"""The timeline as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from offload.errors import StorageError
from offload.telemetry import Event


def write_trace(path: Path, events: Iterable[Event]) -> None:
    """Writes complete events ("ph": "X", microseconds) with one thread a lane. A symlink's target is replaced, not the link.

    Raises:
        StorageError: the file cannot be written, or is no regular file.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise StorageError(f"trace {path}: not a regular file; choose another place for --trace", path=str(path))
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
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"traceEvents": [*names, *rows], "displayTimeUnit": "ms"}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # a name that cannot be written cannot be removed either
            temporary.unlink()
        raise StorageError(
            f"trace {path}: {error.strerror}; choose another place for --trace", path=str(path)
        ) from None
