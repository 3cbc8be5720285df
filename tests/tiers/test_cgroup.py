"""Memory limits from made-up control group trees, both versions, and from the real one."""

from __future__ import annotations

import psutil
import pytest

from offload.tiers import cgroup
from offload.tiers.cgroup import available_memory, memory_limit

NONE_V1 = "9223372036854771712\n"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 10,000 bytes free."""

    class Memory:
        available = 10_000

    monkeypatch.setattr(cgroup.psutil, "virtual_memory", lambda: Memory)


@pytest.fixture
def tree(tmp_path):
    """Makes a tree from `{group folder: {file: text}}` and the membership lines."""

    def make(membership, groups):
        for folder, files in groups.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / folder / name).write_text(text)
        (tmp_path / "membership").write_text(membership)
        return tmp_path, tmp_path / "membership"

    return make


def v1(limit, usage="0\n", stat=""):
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}


def v2(limit, usage="0\n", stat=""):
    return {"memory.max": limit, "memory.current": usage, "memory.stat": stat}


def test_no_control_groups(tmp_path):
    where = tmp_path / "none", tmp_path / "missing"
    assert memory_limit(*where) is None
    assert available_memory(*where) == 10_000


def test_version_1_tightest_of_the_parents(tree):
    groups = {"memory": v1(NONE_V1), "memory/a": v1("5000\n", "1000\n"), "memory/a/b": v1("8000\n")}
    where = tree("5:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n", groups)
    assert memory_limit(*where) == 5000
    assert available_memory(*where) == 4000


def test_version_1_controllers_share_a_line(tree):
    assert memory_limit(*tree("4:hugetlb,memory:/a\n", {"memory/a": v1("5000\n")})) == 5000


def test_version_2(tree):
    groups = {"a": v2("max\n"), "a/b": v2("6000\n", "5000\n", "anon 100\nactive_file 1000\ninactive_file 500\n")}
    where = tree("0::/a/b\n", groups)
    assert memory_limit(*where) == 6000
    assert available_memory(*where) == 6000 - 5000 + 1500


def test_page_cache_counts_as_free_in_version_1(tree):
    stat = "cache 3000\ntotal_active_file 1000\ntotal_inactive_file 1000\ntotal_shmem 1000\n"
    where = tree("4:memory:/\n", {"memory": v1("6000\n", "5000\n", stat)})
    assert available_memory(*where) == 3000


def test_the_own_folder_may_be_invisible_in_a_container(tree):
    assert memory_limit(*tree("0::/docker/abc\n", {".": v2("7000\n")})) == 7000
    assert memory_limit(*tree("0::/../outside\n", {".": v2("7000\n")})) == 7000


def test_no_limit_is_none(tree):
    assert memory_limit(*tree("4:memory:/\n", {"memory": v1(NONE_V1)})) is None
    assert memory_limit(*tree("0::/\n", {".": v2("max\n")})) is None


def test_the_machine_is_a_limit_too(tree):
    assert available_memory(*tree("0::/\n", {".": v2("99999\n")})) == 10_000


def test_over_the_limit_is_zero_not_negative(tree):
    assert available_memory(*tree("0::/\n", {".": v2("10\n", "20\n")})) == 0


def test_this_process(monkeypatch):
    monkeypatch.undo()
    assert 0 < available_memory() <= psutil.virtual_memory().total
    assert memory_limit() is None or memory_limit() > 0
