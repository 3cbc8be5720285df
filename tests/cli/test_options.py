"""Options from the command line to the engine: their names, defaults and groups, and the model that they open."""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, get_type_hints
from unittest.mock import Mock, call

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from offload.cli.chat_files import chat_path
from offload.cli.grouping import grouped
from offload.cli.load_options import KVType, LoadOptions
from offload.cli.loading import OPENING, open_engine
from offload.cli.models import resolve_model
from offload.cli.options import AnswerOptions, SamplingOptions
from offload.config import SamplingConfig
from offload.errors import UsageError

GROUPS = (LoadOptions, SamplingOptions, AnswerOptions)
OPTIONS = {name: hint for group in GROUPS for name, hint in get_type_hints(group, include_extras=True).items()}


def described(name):
    return OPTIONS[name].__metadata__[0]


def test_no_two_options_share_a_flag():
    flags = [flag for name in OPTIONS for flag in (described(name).default, *described(name).param_decls)]
    assert len(flags) == len(set(flags)) and {"--temperature", "--temp", "--ram", "-n"} <= set(flags)


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingOptions)])
def test_the_default_that_help_shows_is_the_one_that_counts(name):
    counts = getattr(SamplingConfig(), name)
    _, shown = described(name).help.removesuffix(".").rsplit("Default: ", 1)
    assert shown == "random" if counts is None else float(shown) == counts


@given(
    st.dictionaries(st.sampled_from([field.name for field in fields(SamplingOptions)]), st.sampled_from([0, 1, 0.0]))
)
def test_what_is_given_is_kept_though_it_be_zero(values):
    assert SamplingOptions(**values).given() == values


@dataclass(frozen=True, kw_only=True)
class Size:
    width: Annotated[int, typer.Option("--width", "-w")] = 3
    tall: Annotated[bool, typer.Option("--tall")] = False


@dataclass(frozen=True, kw_only=True)
class Colour:
    name: Annotated[str | None, typer.Option("--colour")] = None


def test_a_group_is_parsed_as_its_fields_and_arrives_whole():
    calls = []

    def paint(size: Size, colour: Colour, what: Annotated[str, typer.Argument()] = "wall") -> None:
        """Paint it."""
        calls.append((size, colour, what))

    command = grouped(paint)
    assert (command.__name__, command.__doc__) == ("paint", "Paint it.")
    assert list(inspect.signature(command).parameters) == ["width", "tall", "name", "what"]
    app = typer.Typer()
    app.command()(command)
    for line in ([], ["-w", "5", "door", "--tall", "--colour", "red"]):
        assert CliRunner().invoke(app, line).exit_code == 0
    assert calls == [(Size(), Colour(), "wall"), (Size(width=5, tall=True), Colour(name="red"), "door")]


def test_bars_follow_the_phases_of_a_load_and_stop_before_the_engine_is_handed_out(engine_module, model):
    bars = Mock()
    told = bars.mock_calls
    with open_engine(model, LoadOptions(ram="3G", kv_type=KVType.f32), bars) as engine:
        assert told == [call.update(OPENING, 0, None), call.stop()] and not engine.closed
        loaded = engine_module.loads[0]
        for phase in ("load", "warm"):
            loaded["progress"](phase, 1, 2)
    ended = call.end(OPENING)
    assert told[2:] == [ended, call.update("reading the weights", 1, 2), ended, call.update("warm", 1, 2)]
    assert engine.closed and (loaded["ram"], loaded["kv_type"], loaded["trace"]) == ("3G", "f32", False)


def test_a_model_is_a_file_or_a_folder_also_below_the_home_folder(model, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(Path("~/model.gguf")) == model and resolve_model(tmp_path) == tmp_path
    with pytest.raises(UsageError, match=r"^model '~/other.gguf': no such file or folder; give a \.gguf"):
        resolve_model(Path("~/other.gguf"))


def test_the_demo_is_the_first_gguf_of_its_package_which_is_not_imported(monkeypatch, tmp_path: Path):
    folder = tmp_path / "demo_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("offload.cli.models.DEMO_PACKAGE", folder.name)
    with pytest.raises(UsageError, match="or name a model file"):
        resolve_model(None)
    for name in ("b.gguf", "a.gguf", "0.txt"):
        (folder / name).touch()
    assert resolve_model(None) == folder / "a.gguf"


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "/tmp/a\0b"])
def test_paths_that_cannot_be_are_bad_usage(name):
    for find in (lambda: resolve_model(Path(name)), lambda: chat_path(name)):
        with pytest.raises(UsageError, match=r"path '.*(no such user|NUL)"):
            find()


@pytest.mark.parametrize(("name", "value"), [("top_k", 10**309), ("seed", -(10**400)), ("seed", ""), ("seed", [])])
def test_values_that_are_no_number_or_too_large_for_one_are_bad_usage(name, value):
    with pytest.raises(UsageError, match=name):
        SamplingConfig(**{name: value})
