"""Dated result files: what was run, on what, and a table of what came out."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from offload.units import format_size

ROOT = Path(__file__).parents[2]
PACKAGES = ("llama-cpp-python", "torch", "transformers", "accelerate", "triton")
RESULTS = ROOT / "benchmarks" / "results"


def hardware() -> str:
    """One line: processor, cores, memory, kernel."""
    memory = format_size(psutil.virtual_memory().total)
    return f"{_processor()}, {os.cpu_count()} cores, {memory}, {platform.system()} {platform.release()}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(name: str, body: str, *, folder: Path = RESULTS) -> Path:
    """Writes `YYYY-MM-DD_<name>.md` with hardware, versions, commit and the command line above `body`."""
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    text = f"""# {name}, {date.today().isoformat()}

- hardware: {hardware()}
- versions: Python {platform.python_version()}, {versions}; commit {_commit()}
- command: `python {shlex.join(sys.argv)}`

{body}
"""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today().isoformat()}_{name}.md"
    path.write_text(text, encoding="utf-8")
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit, and whether the tree differs from it in more than the results that a series of runs has written."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (_git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
