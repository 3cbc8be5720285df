"""Every example runs as its docstring says, on the demo model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "batch.py": ["2 answers in"],
    "budget.py": ["streamed for each token", "Paris"],
    "chat.py": ["Paris", "prompt tokens were in the cache"],
    "stream.py": ["."],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("Two and two are\n\nThe sky is\n", encoding="utf-8")
    files = [str(tmp_path / "prompts"), str(tmp_path / "answers")] if name == "batch.py" else []
    command = [sys.executable, str(ROOT / "examples" / name), *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in EXPECTED[name]:
        assert text in done.stdout
