"""A slab of host memory: one anonymous region, 2 MiB aligned, in huge pages, touched before use.

Huge pages under the destination are what lets direct reads run at the speed of the disk: the kernel pins 512 times
fewer pages per request. Knows nothing of what is kept in it.

Threads: the owner creates and closes; views may be used from any thread until then.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final

from offload.errors import AllocationError
from offload.tiers.cgroup import available_memory
from offload.units import MIB, PAGE, align_up, format_size

HUGE_PAGE: Final = 2 * MIB
MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; the mmap module does not name it
POPULATE_STEP: Final = 32 * MIB
POPULATE_THREADS: Final = min(4, os.cpu_count() or 1)  # more would wait for memory
CAN_DISCARD: Final = hasattr(mmap, "MADV_DONTNEED") and sys.platform.startswith("linux")
"""Whether a range of a mapping can be given back at once; elsewhere the advice is none, or comes without a promise."""


class Slab:
    """`nbytes` of zeroed, writable memory at a 2 MiB aligned address.

    Args:
        nbytes: usable size; rounded up to whole pages.
        huge_pages: ask the kernel for huge pages; where it has none the slab is the same in small ones.
        prefault: touch everything now, so that memory the machine lacks is an error here and not a kill later.

    Raises:
        AllocationError: refused, or more than the machine and its control groups have free.
    """

    def __init__(self, nbytes: int, *, huge_pages: bool = True, prefault: bool = True) -> None:
        assert nbytes > 0, nbytes
        self.nbytes = align_up(nbytes)
        if prefault:
            self._check_available()
        self._region: mmap.mmap | None = self._map()
        base = _address(self._region)
        self.address = align_up(base, HUGE_PAGE)
        self._start = self.address - base
        self._all = memoryview(self._region)[self._start : self._start + self.nbytes]
        if huge_pages:
            self._advise_huge_pages()
        if prefault:
            self.populate(0, self.nbytes)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes `[offset, offset + nbytes)`, writable, without a copy."""
        assert 0 <= offset <= offset + nbytes <= self.nbytes, (offset, nbytes, self.nbytes)
        return self._all[offset : offset + nbytes]

    def populate(self, offset: int, nbytes: int) -> None:
        """Makes the pages under a range resident now; a range must begin and end on a page.

        Raises:
            AllocationError: the kernel has none.
        """
        assert offset % PAGE == nbytes % PAGE == 0 and 0 <= offset <= offset + nbytes <= self.nbytes, (offset, nbytes)
        end = offset + nbytes
        steps = [(start, min(POPULATE_STEP, end - start)) for start in range(offset, end, POPULATE_STEP)]
        try:
            if len(steps) < 2:
                for step in steps:
                    self._populate(*step)
                return
            with ThreadPoolExecutor(POPULATE_THREADS, "offload-populate") as pool:
                for _ in pool.map(self._populate, *zip(*steps, strict=True)):
                    pass
        except OSError as error:  # now that no thread touches it any more
            self.close()
            raise self._refused(str(error)) from error

    def discard(self, offset: int, nbytes: int) -> None:
        """Gives the pages under a range back at once; it reads as zeros when it is next touched.

        Nothing happens where the system cannot do that.
        """
        assert offset % PAGE == nbytes % PAGE == 0 and 0 <= offset <= offset + nbytes <= self.nbytes, (offset, nbytes)
        if nbytes and self._region is not None and CAN_DISCARD:
            self._region.madvise(mmap.MADV_DONTNEED, self._start + offset, nbytes)

    def close(self) -> None:
        """Gives the memory back at once, idempotent. Views still held stay addressable, their content is undefined."""
        region, self._region = self._region, None
        if region is None:
            return
        if CAN_DISCARD:
            region.madvise(mmap.MADV_DONTNEED, self._start, self.nbytes)
        self._all = memoryview(b"")  # the mapping goes with its last view

    def _map(self) -> mmap.mmap:
        length = self.nbytes + HUGE_PAGE
        try:
            if sys.platform == "win32":
                return mmap.mmap(-1, length)
            # private: the default is shared memory, which has its own rules for huge pages
            return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise self._refused(str(error)) from error

    def _check_available(self) -> None:
        if self.nbytes > available_memory():
            raise self._refused("the machine or its memory control group has less free")

    def _populate(self, offset: int, nbytes: int) -> None:
        if not _populate_by_kernel(self.address + offset, nbytes):
            self._all[offset : offset + nbytes : PAGE] = bytes(nbytes // PAGE)

    def _advise_huge_pages(self) -> None:
        if self._region is None or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        try:
            self._region.madvise(mmap.MADV_HUGEPAGE, self._start, self.nbytes)
        except OSError:  # a kernel built without them; small pages work, only slower
            pass

    def _refused(self, reason: str) -> AllocationError:
        available = available_memory()
        return AllocationError(
            f"memory: {format_size(self.nbytes)} needed, {format_size(available)} available: {reason}; "
            "close other programs or lower --ram",
            needed_bytes=self.nbytes,
            available_bytes=available,
        )


def _populate_by_kernel(address: int, nbytes: int) -> bool:
    """Lets the kernel touch a range, without the interpreter lock that `mmap.madvise` would hold; False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    if not _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), MADV_POPULATE_WRITE):
        return True
    number = ctypes.get_errno()
    if number == errno.EINVAL:
        return False
    raise OSError(number, os.strerror(number))


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _address(region: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(region))
