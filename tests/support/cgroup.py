"""`memory_limited` for tests: skips, with the kernel's reason, where control groups may not be created."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from harness.cgroup import CgroupUnavailable, Group, LimitedRun
from harness.cgroup import memory_limited as create

__all__ = ["Group", "LimitedRun", "memory_limited"]


@contextmanager
def memory_limited(limit_bytes: int) -> Iterator[Group]:
    """See `harness.cgroup.memory_limited`. Skips the test where the machine does not allow it."""
    with ExitStack() as stack:
        try:
            group = stack.enter_context(create(limit_bytes))
        except CgroupUnavailable as error:
            pytest.skip(str(error))
        yield group
