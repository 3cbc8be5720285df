import json
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from rich.console import Console
from support.fake_engine import IO

from offload.cli.bench import _cells, show, summarize
from offload.errors import StorageError
from offload.results import EdgeUse, ExpertUse


@pytest.fixture(autouse=True)
def _disk(monkeypatch):
    monkeypatch.setattr("offload.cli.bench.measure_disk", lambda path, seconds: 2 * IO["nvme->ram"].bandwidth_bps)
    monkeypatch.setattr("offload.cli.bench.open_checkpoint", lambda path: SimpleNamespace(files=[path]))


def test_rows_have_speed_and_the_share_of_the_limit(invoke, engine_module, model):
    result = invoke("bench", model, "--json", "-p", 64, "-n", 4, "-r", 2)
    found = json.loads(result.stdout)
    prefill, decode = found["rows"]
    assert (prefill["test"], prefill["tokens_per_second"], prefill["runs"]) == ("pp64", 35.0, [35.0, 35.0])
    assert (decode["test"], decode["tokens_per_second"]) == ("tg4", 5.4)
    assert decode["disk_share"] == pytest.approx(0.5) and decode["resident"] == 0.25
    assert found["disk_limit_bps"] == 2 * IO["nvme->ram"].bandwidth_bps


def test_no_run_repeats_the_prompt_of_another(invoke, engine_module, model):
    invoke("bench", model, "-p", 8, "-n", 2, "-r", 2, "--json")
    engine = engine_module.engine
    prefill, decode = engine.prompts[:3], engine.prompts[3:]
    assert [len(prompt) for prompt in prefill + decode] == [8, 8, 8, 16, 16, 16]
    assert len({tuple(prompt) for prompt in prefill}) == len({tuple(prompt) for prompt in decode}) == 3
    assert all(options["ignore_eos"] and options["temperature"] == 0 for options in engine.options)


def test_markdown_and_terminal_tables_hold_the_same(invoke, engine_module, model):
    markdown = invoke("bench", model, "--markdown", "-r", 1, "-p", 0).stdout.splitlines()
    assert markdown[0].startswith("| model |") and markdown[1].startswith("| --- |")
    assert "| tg32 | 5.40 | 1.61 GB/s | 50% | 25% | - |" in markdown[2]
    table = invoke("bench", model, "-r", 1, "-p", 0).stdout
    assert "tg32" in table and "50%" in table and "pp512" not in table


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_trace_that_fails_at_the_end_costs_no_report(invoke, engine_module, model, tmp_path, monkeypatch, options):
    monkeypatch.setattr(engine_module.engine, "write_trace", Mock(side_effect=StorageError("no space")))
    result = invoke("bench", model, "-r", 1, "--trace", tmp_path / "trace.json", *options)
    assert "tg32" in result.stdout and (result.exit_code, result.stderr) == (1, "offload: error: no space\n")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_figure_is_cut_on_a_narrow_terminal(width):
    header = ("model", "size", "memory", "test", "tokens/s", "disk", "of its limit", "read a token", "bound")
    cells = [("tiny.gguf", "7.96 GiB", "2.93 GiB", test, "3316.25", "1.61 GB/s", "94%", "341 MiB", "disk")
             for test in ("pp512", "tg128")]  # fmt: skip
    out = StringIO()
    show(header, cells, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert all(word in out.getvalue() for word in (*header, *cells[0], *cells[1])) and "…" not in out.getvalue()
    assert len(lines) == (3 if width == 200 else len(header)) and max(map(len, lines)) <= width


def test_a_model_with_experts_tells_how_they_came(fake):
    completion = fake.generate("x")
    use = ExpertUse(demanded=400, hits=300, fetched_ahead=80, used_ahead=70)
    run = replace(completion, experts=use, io={"nvme->ram": EdgeUse(bytes=5000, busy_s=1.0)})
    row = summarize("tg10", [run], lambda c: 1.0, 1e9, 1024**3, tokens=10, bound="disk")
    assert (row.hit_rate, row.misses_per_token, row.bytes_per_token) == (0.75, 10.0, 500.0)
    assert _cells(row)[-3:] == ("75%, 10 misses a token", "500 B", "disk")


def test_nothing_to_measure_is_bad_usage(invoke, engine_module, model):
    assert invoke("bench", model, "-p", 0, "-n", 0).exit_code == 2
    assert "give 2 or more" in invoke("bench", model, "-n", 1).stderr


def test_a_resident_model_has_no_disk_share(fake):
    completion = fake.generate("x")
    resident = type(completion)(**{name: getattr(completion, name) for name in completion.__slots__} | {"io": {}})
    row = summarize("tg1", [resident], lambda c: c.timings.decode_tps, 1e9, 1024**3, tokens=1, bound="compute")
    assert (row.bytes_per_token, row.hit_rate, row.bound) == (0, None, "compute")
    assert row.disk_bps is None and row.disk_share is None and row.resident == 1.0
