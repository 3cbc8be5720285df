"""The device benchmark: lines are filed as they are measured, its switch takes the overlap away and nothing else."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import device as benchmark
import pytest
import torch
from harness.gguf_file import write_gguf
from harness.growing import Growing
from harness.shapes import Shape

import offload
from offload.device_stream import DeviceStream

LAYERED = Shape(num_layers=24, hidden=256, intermediate=512, num_heads=4, num_kv_heads=2, tied=False, element="Q4_K")


def fails() -> list[str]:
    raise RuntimeError("the card is\ngone | lost")


def test_each_line_is_filed_at_once_and_a_failure_is_one_of_them(tmp_path: Path) -> None:
    report = Growing("card", tmp_path, seconds=60)
    report.begin()
    report.add("A card.")
    report.begin("model", "speed", "share")
    report.measure("first", lambda: ["1", "2"])
    assert report.path is not None and "| first | 1 | 2 |" in report.path.read_text()
    report.measure("second", fails)
    report.seconds = -1.0
    report.measure("third", fails)
    text = report.path.read_text()
    assert "A card." in text and [path.name for path in tmp_path.iterdir()] == [report.path.name]
    assert "| second | RuntimeError: the card is gone / lost | - |\n| third | not run: out of time | - |" in text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "layered.gguf"
    write_gguf(path, LAYERED, seed=1)
    return path


def test_without_overlap_nothing_is_copied_ahead_and_tokens_are_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[int] = []
    tokens: list[tuple[int, ...]] = []
    acquire, generate = DeviceStream.acquire, offload.Engine.generate

    def watched(self: DeviceStream, *args: Any) -> Any:
        ahead.append(len(self._ahead))
        return acquire(self, *args)

    def kept(self: offload.Engine, *args: Any, **options: Any) -> Any:
        done = generate(self, *args, **options)
        tokens.append(done.tokens)
        return done

    monkeypatch.setattr(DeviceStream, "acquire", watched)
    monkeypatch.setattr(offload.Engine, "generate", kept)
    options = Namespace(device="torch:cpu", tokens=3, prompt_tokens=8)
    run = benchmark.Run(options, torch.device("cpu"), Growing("card", tmp_path, 60))
    with_overlap = benchmark.decode(run, model, 1e9, dense=0.25)
    assert max(ahead) > 1 and with_overlap[1] != "0 B" and with_overlap[4].endswith("%")
    ahead.clear()
    without = benchmark.decode(run, model, 1e9, dense=0.25, overlap=False)
    assert set(ahead) == {0} and without[:2] == with_overlap[:2]
    assert tokens[:2] == tokens[2:] and len(tokens) == 4


def test_what_the_cpu_measures_is_not_filed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def parsed(*options: str) -> Path:
        monkeypatch.setattr("sys.argv", ["device.py", *options])
        return benchmark.arguments().results

    assert parsed("--device", "cuda") == parsed() == benchmark.RESULTS
    assert parsed("--device", "torch:cpu", "--results", str(tmp_path)) == tmp_path
    assert parsed("--device", "torch:cpu") != benchmark.RESULTS
    with pytest.raises(SystemExit):
        parsed("--device", "torch:cpu", "--results", str(benchmark.RESULTS / "x"))
