"""What a clone and a wheel contain, and that the commands in README are those that continuous integration runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("cli", "models", "prefetch", "tiers")


def toml_list(name: str) -> list[str]:
    """A list of strings in pyproject.toml. (tomllib is newer than the oldest Python that is supported.)"""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert found, name
    return re.findall(r'"([^"]+)"', found[1])


@pytest.mark.parametrize("name", LINKS)
def test_a_top_level_folder_is_linked_into_the_package(name: str) -> None:
    link = ROOT / "offload" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"  # noqa: PTH115 - the text of the link, not its target


def test_the_links_are_committed_as_links() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-s", *(f"offload/{name}" for name in LINKS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["120000"] * len(LINKS)


def test_every_folder_with_modules_is_a_listed_package() -> None:
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for name in ("offload", *LINKS)
        for path in (ROOT / name).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    expected = {name if name.partition(".")[0] == "offload" else f"offload.{name}" for name in folders}
    assert set(toml_list("packages")) == expected


def test_a_wheel_holds_the_modules_under_one_root(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    pack = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    archive = subprocess.run(
        ["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input=pack.stdout, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x"], cwd=source, input=archive.stdout, check=True)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {"offload/py.typed", "offload/units.py", "offload/models/base.py"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"offload"}


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python3 -m venv")]


def test_readme_has_two_commands_and_the_second_is_what_continuous_integration_runs() -> None:
    start, check = readme_commands()
    assert "pip install '.[demo]'" in start
    assert start.endswith("offload chat")
    assert check in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_extra_that_the_commands_install_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    used = {
        extra
        for command in readme_commands()
        for found in re.findall(r"\.\[([a-z,]+)\]", command)
        for extra in found.split(",")
    }
    assert used
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in used)


@pytest.mark.parametrize("script", [".ci/run", "scripts/check", "scripts/fix"])
def test_scripts_can_be_run_and_stop_at_the_first_failure(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
