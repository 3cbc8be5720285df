"""Segments leave the disk: what has to make room, and what killed writers left. Never what somebody holds open."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path

from offload.sessions.catalog import LOCK, RECORD, ROWS, Catalog
from offload.sessions.locking import excluding, holding
from offload.sessions.record import SEGMENT_ID


def remove(catalog: Catalog, segment: str) -> bool:
    """Removes a segment, its record first: killed in between, it leaves rows without a record and never the reverse.

    False where somebody appends to it or holds it open, or the system does not let it go.
    """
    record, rows, lock = (catalog.path(segment, kind) for kind in (RECORD, ROWS, LOCK))
    try:
        with ExitStack() as stack:
            if not stack.enter_context(holding(lock)):
                return False
            if rows.is_file() and not rows.is_symlink() and not stack.enter_context(excluding(rows)):
                return False
            for path in (record, rows, lock):
                path.unlink(missing_ok=True)
    except OSError:
        return False
    catalog.forget(segment)
    return True


def sweep(catalog: Catalog) -> None:
    """Removes what killed writers left: rows without a record, and records that were never finished.

    Raises:
        OSError: the folder cannot be read.
    """
    catalog.look()
    for segment in catalog.segments() - catalog.records.keys() - catalog.broken.keys():
        remove(catalog, segment)
    for path in catalog.folder.glob(f".*{RECORD}.*.partial"):
        _finish(catalog, path)


def _finish(catalog: Catalog, partial: Path) -> None:
    segment = partial.name.split(".")[1]
    if SEGMENT_ID.fullmatch(segment):
        lock = catalog.path(segment, LOCK)
        with suppress(OSError), holding(lock) as held:  # which whoever writes a record holds
            if held:
                partial.unlink()
                if not catalog.path(segment, RECORD).exists():
                    lock.unlink()
