"""`offload trace` and `offload tune` as a person uses them, on the trained mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload.prefetch.trace_file import read_routing

MODEL = Path(__file__).parents[1] / "assets" / "trained_moe" / "stdlib-olmoe-Q8_0.gguf"
TEXT = "import os\n\ndef walk(top):\n    for name in os.listdir(top):\n        print(name)\n" * 6


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("offload.tuning.user_cache_path", lambda name: tmp_path / name)
    return tmp_path


@pytest.fixture
def recorded(invoke, tmp_path):
    text = tmp_path / "text.py"
    text.write_text(TEXT)
    result = invoke("trace", "record", MODEL, "--file", text, "--ctx", 64, "--quiet")
    assert result.exit_code == 0, result.stderr
    (path,) = (tmp_path / "offload" / "experts").glob("*.trace")
    return result, path


def test_a_text_of_any_length_is_recorded_and_remembered(invoke, recorded):
    result, path = recorded
    trace = read_routing(path)
    assert trace.num_tokens > 64 and trace.origin.endswith("text.py")
    assert f"{trace.num_tokens} tokens through 6 layers, written to {path}" in result.stdout
    assert "plan predicts from this trace" in result.stdout
    found = invoke("plan", MODEL, "--ram", "minimum", "--ctx", 64)
    assert "as often found in memory as in the recorded trace" in found.stdout


def test_policies_stand_beside_the_optimum(invoke, recorded):
    _, path = recorded
    report = json.loads(
        invoke("trace", "replay", path, "--json", "--cache", 25, "--policy", "lru", "--policy", "lfu").stdout
    )
    rows = {row["policy"]: row for row in report["rows"]}
    assert list(rows) == ["lru", "lfu", "belady"] and rows["lru"]["slots"] == 48
    assert rows["belady"]["hit_rate"] >= max(rows["lru"]["hit_rate"], rows["lfu"]["hit_rate"])
    assert rows["lru"]["bytes_per_token"] > rows["belady"]["bytes_per_token"] > 0
    assert report["experts"] == 32 and 1 < report["effective_experts"] < 32
    assert 0.125 < report["segment_routing_performance"] < 1
    table = invoke("trace", "replay", path, "--cache", 25).stdout
    assert "lrfu-64 (default)" in table and "belady" in table and "SRP" in table


def test_predictors_stand_between_chance_and_perfection(invoke, recorded):
    _, path = recorded
    options = ("--cache", 25, "--policy", "lru", "--predictors")
    rows = json.loads(invoke("trace", "replay", path, "--json", *options).stdout)["predictors"]
    found = {row["predictor"]: row["recall"] for row in rows if row["ahead"] == 1}
    assert found["perfect"] == 1.0 and found["chance"] < 0.25 < found["gate"] < 1.0
    assert {row["ahead"] for row in rows} == {1, 2, 3}
    assert "blend" in invoke("trace", "replay", path, *options).stdout


def test_memory_is_given_as_for_a_run(invoke, recorded):
    _, path = recorded
    found = invoke("trace", "replay", path, "--ram", "1GiB", "--policy", "lru", "--json")
    assert json.loads(found.stdout)["rows"][0]["slots"] == 192
    result = invoke("trace", "replay", path, "--ram", "8MiB")
    assert result.exit_code == 2 and "it needs at least" in result.stderr


def test_a_prompt_and_its_answer_go_where_they_are_wanted(invoke, tmp_path):
    place = tmp_path / "my.trace"
    result = invoke("trace", "record", MODEL, "-p", "def main():", "-n", 8, "-o", place, "--ctx", 64, "-q")
    assert result.exit_code == 0 and read_routing(place).num_tokens > 8
    assert not (tmp_path / "offload" / "experts").exists(), "nothing else is remembered then"


def test_wrong_use_is_one_line(invoke, tmp_path, model):
    missing = invoke("trace", "replay", tmp_path / "missing")
    assert missing.exit_code == 1 and "check the path" in missing.stderr
    bad = tmp_path / "bad"
    bad.write_bytes(b"not a trace, but long enough to be looked at")
    assert "not a routing trace" in invoke("trace", "replay", bad).stderr
    assert "choose lru" in invoke("trace", "replay", bad, "--policy", "magic").stderr
    kept = tmp_path / "notes.txt"
    kept.write_text("precious")
    refused = invoke("trace", "record", MODEL, "-p", "def main():", "-o", kept, "--ctx", 64, "-q")
    assert refused.exit_code == 1 and kept.read_text() == "precious" and refused.stderr.count("\n") == 1


def test_too_little_text_teaches_nothing(invoke, recorded):
    _, path = recorded
    before = path.read_bytes()
    result = invoke("trace", "record", MODEL, "-p", "def main():", "--ctx", 64, "-q")
    assert result.exit_code == 2 and "tokens are too few to learn from, 128 would do" in result.stderr
    assert path.read_bytes() == before


def test_a_place_that_will_not_do_is_told_before_the_work(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr("offload.cli.trace.open_engine", None)
    result = invoke("trace", "record", MODEL, "-p", "x", "-o", tmp_path / "none" / "a.trace", "-q")
    assert result.exit_code == 2 and "no such folder" in result.stderr and not (tmp_path / "none").exists()


def test_a_trial_keeps_the_longer_trace(invoke, recorded):
    _, path = recorded
    before, tokens = path.read_bytes(), read_routing(path).num_tokens
    result = invoke("tune", MODEL, "--ram", "minimum", "--ctx", 128, "-n", 16, "-p", "def main():", "--json", "-q")
    kept = json.loads(result.stdout)["kept"]
    assert path.read_bytes() == before and kept["tokens"] == tokens and kept["by"] == "trial"


def test_what_cannot_be_tuned_is_told(invoke, demo):
    result = invoke("tune", MODEL, "--coarse-experts-below", 0.1, "-q")
    assert result.exit_code == 2 and "cannot be compared" in result.stderr
    result = invoke("tune", demo, "-q")
    assert result.exit_code == 2 and "no experts, and so nothing to tune" in result.stderr


def test_tune_tries_and_remembers(invoke, tmp_path):
    result = invoke("tune", MODEL, "--ram", "minimum", "--ctx", 128, "-n", 16, "-p", "def main():", "--json", "-q")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {attempt["name"] for attempt in report["attempts"]} >= {"prefetch on", "prefetch off"}
    assert Path(report["path"]).is_file() and report["kept"]["by"] == "trial"
    assert next(Path(report["path"]).parent.glob("*.trace")).is_file()


def test_there_is_nothing_to_tune_where_everything_fits(invoke):
    result = invoke("tune", MODEL, "--ctx", 128, "-n", 16, "-q")
    assert result.exit_code == 2 and "nothing to tune" in result.stderr
