"""Room for new rows: the segments that go for them, of all models whose folders share the limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet

from offload.errors import StorageError
from offload.sessions.catalog import Catalog
from offload.sessions.eviction import Stored, order
from offload.sessions.removal import remove
from offload.units import format_size


def make_room(
    catalogs: Sequence[Catalog],
    needed_bytes: int,
    limit_bytes: int,
    in_use: Collection[str],
    referred: Callable[[], AbstractSet[str]],
) -> None:
    """Removes segments until `needed_bytes` more stay below the limit.

    Args:
        in_use: what this process holds open. What others do is found out when it cannot be removed.

    Raises:
        StorageError: what is open leaves too little. Nothing was removed where that could be told before.
        OSError: a folder cannot be read.
    """
    stored = {segment: (catalog, _stored(catalog, segment)) for catalog in catalogs for segment in catalog.segments()}
    total = sum(segment.nbytes for _, segment in stored.values())
    if total + needed_bytes <= limit_bytes:
        return
    fixed = sum(stored[segment][1].nbytes for segment in in_use if segment in stored)
    kept = set(in_use)
    if fixed + needed_bytes <= limit_bytes:
        for segment in order([segment for _, segment in stored.values()], referred(), time.time()):
            catalog = stored[segment.id][0]
            if segment.id in catalog.newer or segment.id in kept or not remove(catalog, segment.id):
                kept.add(segment.parent)
                continue
            total -= segment.nbytes
            if total + needed_bytes <= limit_bytes:
                return
        fixed = total  # others hold more than could be told before
    raise StorageError(
        f"stored conversations: {format_size(needed_bytes)} more do not fit beside {format_size(fixed)} in use, "
        f"the limit is {format_size(limit_bytes)}; raise it or close conversations",
        path=str(catalogs[0].folder),
    )


def _stored(catalog: Catalog, segment: str) -> Stored:
    """What cannot be used is worth nothing, and goes first."""
    record = catalog.records.get(segment)
    return Stored(
        id=segment,
        parent=record.parent if record else "",
        start=record.start if record else 0,
        num_rows=record.num_rows if record else 0,
        nbytes=catalog.nbytes(segment),
        used_at=catalog.used_at(segment),
    )
