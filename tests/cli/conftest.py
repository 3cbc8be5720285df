import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine, FakeEngineModule, with_budget
from typer.testing import CliRunner, Result

from offload.cli.main import app


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def engine_module(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> FakeEngineModule:
    module = FakeEngineModule(fake)
    monkeypatch.setitem(sys.modules, "offload.engine", module)  # type: ignore[misc]
    for place in ("what_if", "planning"):  # the first is imported here, with what the second has
        monkeypatch.setattr(f"offload.{place}.with_budget", with_budget)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    for variable in ("RAM", "VRAM", "CTX", "DEVICE", "THREADS", "KV_TYPE", "TRACE", "MODEL", "DEBUG", "QUIET"):
        monkeypatch.delenv(f"OFFLOAD_{variable}", raising=False)


@pytest.fixture
def invoke() -> Callable[..., Result]:
    def call(*arguments: object, **options: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]

    return call
