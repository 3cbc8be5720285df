"""Tables of the cache through a ring, against a plain model: passes that add, are cut or fail, and writes that end late.

What is read from a bucket that is still being written is garbage, and so is what is written from memory that was given away.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from offload.blocks import BlockKey, Extent
from offload.errors import Cancelled, StorageError
from offload.kv_stream import TableLayout, TableStream
from offload.tiers.base import CancelToken, TransferHandle
from offload.tiers.files import LocalStorage
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import Slab
from offload.tiers.spill import SpillFile, SpillStorage
from offload.units import PAGE

TOKENS, BUCKETS = 4, 5  # of a bucket, of a table
KEYS = [BlockKey("kv", 0, "blk.0.cache", head) for head in range(4)]


class LateFile:
    """Writes end when they are told to, or waited for; until then the place holds garbage. `reader` sees it at once."""

    path = Path("spill")

    def __init__(self, nbytes: int) -> None:
        self.content, self.waiting = bytearray(nbytes), deque[tuple[int, memoryview, TransferHandle]]()
        self.fails = False

    def start_write(self, offset: int, source: memoryview) -> TransferHandle:
        self.content[offset : offset + len(source)] = b"\xee" * len(source)
        handle = _Late(self)
        self.waiting.append((offset, source, handle))
        return handle

    def end_one(self) -> None:
        offset, source, handle = self.waiting.popleft()
        self.content[offset : offset + len(source)] = source
        if self.fails:
            handle.fail(StorageError("no room", path="spill"))
        else:
            handle.complete(len(source))


class _Late(TransferHandle):
    def __init__(self, file: LateFile) -> None:
        super().__init__(pieces=1, nbytes=0)
        self.file = file

    def wait(self, cancel: CancelToken | None = None, timeout_s: float = 1.0) -> None:
        while not self.done():
            self.file.end_one()
        super().wait(cancel, timeout_s)


class Content:
    """Reads what the file holds at the moment."""

    def __init__(self, file: LateFile) -> None:
        self.file = file

    def read_extent(self, extent: Extent, destination: memoryview) -> TransferHandle:
        destination[: extent.nbytes] = self.file.content[extent.offset : extent.end]
        return TransferHandle.completed(extent.nbytes)

    def cancel_pending(self) -> int:
        return 0

    def drain(self) -> None:
        pass


def rows(table: int, position: int, salt: int, nbytes: int) -> bytes:
    return bytes((17 * table + 5 * position + salt + i) % 251 for i in range(nbytes))


class Tables(RuleBasedStateMachine):
    @initialize(num_tables=st.integers(1, 4), room=st.integers(1, 3))
    def start(self, num_tables: int, room: int) -> None:
        self.layout = TableLayout(num_tables, BUCKETS, TOKENS, PAGE)
        self.row = PAGE // TOKENS
        self.file = LateFile(num_tables * BUCKETS * PAGE)
        self.tails, self.ring = (Slab(n, huge_pages=False) for n in (num_tables * PAGE, room * BUCKETS * PAGE))
        self.stream = TableStream(KEYS[:num_tables], self.layout, self.tails, self.ring, self.file, Content(self.file))  # type: ignore[arg-type]
        self.cached = [[b""] * 0 for _ in range(num_tables)]
        self.length = self.salt = 0

    def teardown(self) -> None:
        while hasattr(self, "file") and self.file.waiting:
            self.file.end_one()

    @rule(kept=st.floats(0, 1), fresh=st.integers(1, 9), stop_at=st.integers(0, 12), data=st.data())
    def run_pass(self, kept: float, fresh: int, stop_at: int, data: st.DataObject) -> None:
        """Most passes go on where the last one ended; some begin earlier, and some end before the last table."""
        start = self.length if kept > 0.3 else int(kept / 0.3 * self.length)
        stop = min(start + fresh, TOKENS * BUCKETS)
        if start == stop:
            return
        self.salt += 1
        self.stream.begin(start, stop)
        for table, known in enumerate(self.cached):
            if table == stop_at:
                self.stream.restart()
                self.length = min(self.length, start)
                return
            address = self.stream.acquire(KEYS[table], None).address - self.ring.address
            region = self.ring.view(address, -(-stop // TOKENS) * PAGE)
            assert bytes(region[: start * self.row]) == b"".join(known[:start])
            del known[start:]
            for position in range(start, stop):
                known.append(rows(table, position, self.salt, self.row))
                region[position * self.row : (position + 1) * self.row] = known[-1]
            for _ in range(data.draw(st.integers(0, 2))):
                if self.file.waiting:
                    self.file.end_one()
            self.stream.release(1)
        self.length = stop

    @precondition(lambda self: self.file.waiting)
    @rule()
    def a_write_ends(self) -> None:
        self.file.end_one()
        self.stream.fill()


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def real(folder: Path, num_tables: int = 3) -> tuple[TableStream, SpillFile, NvmeReader, Slab]:
    layout = TableLayout(num_tables, BUCKETS, TOKENS, PAGE)
    file = SpillFile(folder, num_tables * BUCKETS * PAGE)
    reader = NvmeReader(SpillStorage(file), [file.path], 2)
    ring = Slab(2 * BUCKETS * PAGE, huge_pages=False)
    tails = Slab(layout.tails_nbytes, huge_pages=False)
    return TableStream(KEYS[:num_tables], layout, tails, ring, file, reader), file, reader, ring


def test_rows_go_to_a_file_without_a_name_and_come_back(tmp_path: Path) -> None:
    stream, file, reader, ring = real(tmp_path)
    assert list(tmp_path.iterdir()) == [] and file.direct == (LocalStorage().open(Path(__file__)).direct)
    generator, seen = np.random.default_rng(3), [b""] * 3
    row = PAGE // TOKENS
    for start in range(0, TOKENS * BUCKETS - 2, 3):
        stream.begin(start, start + 3)
        for table in range(3):
            address = stream.acquire(KEYS[table], None).address - ring.address
            assert bytes(ring.view(address, start * row)) == seen[table]
            fresh = generator.bytes(3 * row)
            ring.view(address + start * row, 3 * row)[:] = fresh
            seen[table] += fresh
            stream.release(1)
    stream.restart()
    assert file.statistics().bytes == 3 * 4 * PAGE and reader.statistics().bytes > 3 * 4 * PAGE
    stream.restart()
    reader.close()
    file.close()
    file.close()


def test_a_disk_that_is_full_is_one_line_and_stays_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, file, reader, _ = real(tmp_path)
    monkeypatch.setattr("offload.tiers.spill.os.pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))

    def run_pass(start: int) -> None:
        stream.begin(start, start + TOKENS)
        for table in range(3):
            stream.acquire(KEYS[table], None)
            stream.release(1)

    with pytest.raises(StorageError, match=r"KV cache failed: No space left.*; free room") as caught:
        [run_pass(start) for start in (0, TOKENS)]
    assert "\n" not in str(caught.value)
    stream.restart()
    with pytest.raises(StorageError, match="No space left"):
        stream.begin(0, 1)
    reader.close()
    file.close()


def test_a_cancelled_wait_leaves_what_was_there(tmp_path: Path) -> None:
    stream, file, reader, _ = real(tmp_path)
    cancel = CancelToken()
    cancel.cancel()
    stream.begin(0, TOKENS)
    for table in range(3):
        stream.acquire(KEYS[table], None)
        stream.release(1)
    stream.restart()
    stream.begin(TOKENS, TOKENS + 1)
    try:
        stream.acquire(KEYS[0], cancel)
    except Cancelled:
        stream.restart()
    stream.restart()
    stream.begin(TOKENS, TOKENS + 1)
    stream.acquire(KEYS[0], None)
    stream.restart()
    reader.close()
    file.close()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot hold .* of the KV cache: .*; choose another folder"):
        SpillFile(tmp_path / "file", PAGE)
