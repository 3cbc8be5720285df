"""The contract of `File`, for direct, buffered and fake files, and what only real files do."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from offload.errors import StorageError
from offload.tiers import files
from offload.tiers.files import LocalStorage, read_exactly
from offload.tiers.memory import FakeStorage
from offload.tiers.wrapper import Fault, FaultyStorage
from offload.units import PAGE

NAME = Path("model.bin")


class FileContract:
    """Subclasses give `storage`, `path`, and how to change the file under its reader."""

    direct = False

    @pytest.fixture
    def file(self, storage, path):
        file = storage.open(path)
        yield file
        file.close()

    def test_describes_itself(self, file, path, content):
        assert (file.path, file.nbytes, file.direct) == (path, len(content), self.direct)

    def test_missing_file(self, storage, path):
        with pytest.raises(StorageError, match="nothing-here: cannot be opened"):
            storage.open(path.with_name("nothing-here"))

    def test_reads_a_window(self, file, slab, content):
        assert file.read_into(slab.view(0, 2 * PAGE), PAGE) == 2 * PAGE
        assert bytes(slab.view(0, 2 * PAGE)) == content[PAGE : 3 * PAGE]

    def test_a_window_past_the_end_comes_short(self, file, slab, content):
        assert file.read_into(slab.view(0, 4 * PAGE), 4 * PAGE) == PAGE + 123
        assert bytes(slab.view(0, PAGE + 123)) == content[4 * PAGE :]
        assert file.read_into(slab.view(0, PAGE), 6 * PAGE) == 0

    def test_read_exactly_takes_what_exists(self, file, slab, content):
        read_exactly(file, slab.view(0, 6 * PAGE), 0, len(content))
        assert bytes(slab.view(0, len(content))) == content

    def test_read_exactly_names_what_is_missing(self, file, slab, content):
        with pytest.raises(StorageError) as caught:
            read_exactly(file, slab.view(0, 2 * PAGE), 4 * PAGE, 2 * PAGE)
        for part in (
            str(file.path),
            f"{2 * PAGE} bytes",
            f"offset {4 * PAGE}",
            f"after {PAGE + 123}",
            "load the model",
        ):
            assert part in str(caught.value)
        assert caught.value.path == str(file.path) and caught.value.offset == 4 * PAGE

    def test_unchanged(self, file, slab):
        file.read_into(slab.view(0, PAGE), 0)
        assert file.changed() is None

    def test_notices_truncation(self, file, slab, content):
        self.rewrite(content[:PAGE])
        assert file.changed() == f"its size went from {len(content)} to {PAGE} bytes"
        with pytest.raises(StorageError, match="ends early"):
            read_exactly(file, slab.view(0, PAGE), 2 * PAGE, PAGE)

    def test_notices_a_write_of_equal_size(self, file, content):
        self.rewrite(bytes(len(content)))
        assert file.changed() == "it was written to"

    def test_notices_removal(self, file):
        self.remove()
        assert file.changed() == "it was removed"

    def test_close_is_idempotent(self, storage, path):
        file = storage.open(path)
        file.close()
        file.close()

    def test_two_openings_are_independent(self, storage, path, slab, content):
        first, second = storage.open(path), storage.open(path)
        first.close()
        read_exactly(second, slab.view(0, PAGE), 0, PAGE)
        assert bytes(slab.view(0, PAGE)) == content[:PAGE]
        second.close()


class LocalContract(FileContract):
    @pytest.fixture
    def path(self, tmp_path, content):
        self.local = tmp_path / NAME
        self.local.write_bytes(content)
        return self.local

    def rewrite(self, data):
        before = self.local.stat().st_mtime_ns
        with self.local.open("r+b") as file:
            file.truncate(len(data))
            file.write(data)
        os.utime(self.local, ns=(before, before + 1))  # coarse clocks would hide a write this soon after the first

    def remove(self):
        self.local.unlink()

    def test_notices_replacement(self, file, path, content):
        other = path.with_name("other")
        other.write_bytes(content)
        other.replace(path)
        assert file.changed() == "it was replaced by another file"

    def test_refuses_what_is_no_file(self, storage, tmp_path):
        with pytest.raises(StorageError, match=r"not a regular file|cannot be opened"):
            storage.open(tmp_path)
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(StorageError, match="not a regular file"):
            storage.open(tmp_path / "pipe")

    def test_no_descriptor_leaks(self, storage, path, tmp_path):
        if not Path("/proc/self/fd").exists():
            pytest.skip("no /proc")
        before = len(list(Path("/proc/self/fd").iterdir()))
        storage.open(path).close()
        for wrong in (tmp_path, tmp_path / "missing"):
            with pytest.raises(StorageError):
                storage.open(wrong)
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    def test_an_empty_file_opens(self, storage, tmp_path):
        (tmp_path / "empty").touch()
        file = storage.open(tmp_path / "empty")
        assert file.nbytes == 0
        file.close()


class TestDirect(LocalContract):
    direct = True

    @pytest.fixture
    def storage(self, tmp_path):
        (tmp_path / "trial").write_bytes(b"x" * PAGE)
        trial = LocalStorage().open(tmp_path / "trial")
        trial.close()
        if not trial.direct:
            pytest.skip(f"no direct I/O under {tmp_path}")
        return LocalStorage()


class TestBuffered(LocalContract):
    @pytest.fixture
    def storage(self):
        return LocalStorage(direct=False)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
class TestBufferedInMemoryFileSystem(LocalContract):
    @pytest.fixture
    def tmp_path(self):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)

    @pytest.fixture
    def storage(self):
        return LocalStorage(direct=False)


class TestRefusedAtOpen(LocalContract):
    """A file system that rejects O_DIRECT in `open`."""

    @pytest.fixture
    def storage(self, monkeypatch):
        real = os.open

        def refusing(path, flags, *rest):
            if flags & files.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(path, flags, *rest)

        monkeypatch.setattr(files.os, "open", refusing)
        return LocalStorage()


class TestRefusedAtFirstRead(LocalContract):
    """A file system that takes O_DIRECT in `open` and rejects the reads."""

    @pytest.fixture
    def storage(self, monkeypatch):
        real, opened = os.preadv, os.open
        direct = set()

        def remembering(path, flags, *rest):
            fd = opened(path, flags, *rest)
            (direct.add if flags & files.O_DIRECT else direct.discard)(fd)
            return fd

        def refusing(fd, *rest):
            if fd in direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(fd, *rest)

        monkeypatch.setattr(files.os, "open", remembering)
        monkeypatch.setattr(files.os, "preadv", refusing)
        return LocalStorage()


class TestWithoutPreadv(LocalContract):
    """Windows: neither O_DIRECT nor preadv."""

    @pytest.fixture
    def storage(self, monkeypatch):
        monkeypatch.setattr(files, "HAS_PREADV", False)
        monkeypatch.setattr(files, "HAS_FADVISE", False)
        return LocalStorage(direct=False)


class TestFake(FileContract):
    @pytest.fixture
    def path(self):
        return NAME

    @pytest.fixture
    def storage(self, content):
        self.fake = FakeStorage({NAME: content})
        return self.fake

    def rewrite(self, data):
        self.fake.write(NAME, data)

    def remove(self):
        self.fake.remove(NAME)


@pytest.mark.parametrize("kind", ["eintr", "short"])
def test_read_exactly_carries_on(kind, slab, content):
    storage = FaultyStorage(FakeStorage({NAME: content}), [Fault(at=at, kind=kind) for at in (1, 2, 3)])
    read_exactly(storage.open(NAME), slab.view(0, 6 * PAGE), 0, len(content))
    assert bytes(slab.view(0, len(content))) == content
    assert storage.reads == 4


@pytest.mark.parametrize(("kind", "number"), [("eio", errno.EIO), ("enospc", errno.ENOSPC)])
def test_read_exactly_keeps_the_error_number(kind, number, slab, content):
    storage = FaultyStorage(FakeStorage({NAME: content}), [Fault(at=1, kind=kind)])
    with pytest.raises(StorageError, match=os.strerror(number)) as caught:
        read_exactly(storage.open(NAME), slab.view(0, 6 * PAGE), 0, len(content))
    assert caught.value.errno == number


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc")
@pytest.mark.parametrize("direct", [True, False])
def test_no_page_cache_is_left_behind(direct, tmp_path, slab, content):
    """A second read must come from the disk again: `read_bytes` counts what the block layer delivered."""
    path = tmp_path / NAME
    with path.open("wb") as written:
        written.write(bytes(2**20))
        os.fsync(written.fileno())
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file = LocalStorage(direct=direct).open(path)
    fetched = []
    for _ in range(2):
        before = _bytes_from_disk()
        read_exactly(file, slab.view(0, 2**20), 0, 2**20)
        fetched.append(_bytes_from_disk() - before)
    file.close()
    if fetched[0] == 0:
        pytest.skip("this file system has no disk under it")
    assert fetched[1] >= 2**20


def _bytes_from_disk() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])
