import json
from pathlib import Path

import pytest
from support.headers import safetensors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    config = {"model_type": "llama", "max_position_embeddings": 512, "auto_map": {"AutoModel": "evil.Model"}}
    (root / "config.json").write_text(json.dumps(config))
    header = {"model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    (root / "model.safetensors").write_bytes(safetensors(header, bytes(16)))
    Tokenizer(WordLevel({"hello": 0, "world": 1}, unk_token="hello")).save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (root / "evil.py").write_text("raise SystemExit('remote code ran')")
    return root


def test_a_folder_is_described_and_its_code_never_run(invoke, folder):
    found = json.loads(invoke("inspect", folder, "--json").stdout)
    assert (found["format"], found["architecture"], found["parameters"]) == ("huggingface", "llama", 4)
    assert found["elements"] == {"F32": {"tensors": 1, "parameters": 4, "bytes": 16}}
    assert (found["tokenizer"], found["context_length"], found["license"]) == ("tokenizer.json", 512, None)
    assert found["remote_code"] is True and found["chat_template"] is True
    assert found["vocab_size"] == 2 and found["chat_template_error"] is None
    assert found["files"][0]["path"].endswith("model.safetensors") and "tensors" not in found
    text = invoke("inspect", folder).stdout
    assert "asked for, and never run" in text


def test_tensors_are_listed_when_asked_for(invoke, folder):
    (tensor,) = json.loads(invoke("inspect", folder, "--tensors", "--json").stdout)["tensors"]
    assert (tensor["element"], tensor["shape"], tensor["bytes"]) == ("F32", [4], 16)
    assert tensor["file"] == "model.safetensors" and tensor["offset"] > 8
    assert "norm" in invoke("inspect", folder, "--tensors").stdout


def test_a_broken_tokenizer_is_a_finding(invoke, folder):
    (folder / "tokenizer.json").write_text("[" * 100_000)
    result = invoke("inspect", folder, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["tokenizer_error"] and found["chat_template"] is False
    assert "unusable" in invoke("inspect", folder).stdout


def test_a_template_that_burns_time_is_a_finding(invoke, folder):
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": endless}))
    found = json.loads(invoke("inspect", folder, "--json").stdout)
    assert found["chat_template"] and found["chat_template_error"]
    assert "refused by the sandbox" in invoke("inspect", folder).stdout


def test_names_of_a_hostile_file_reach_no_terminal(invoke, folder):
    config = {"model_type": "llama", "_name_or_path": "\x1b]0;owned\x07[red]name"}
    (folder / "config.json").write_text(json.dumps(config))
    text = invoke("inspect", folder).stdout
    assert "\x1b" not in text and "[red]name" in text


def test_nothing_is_cut_where_no_terminal_shows_it(invoke, folder):
    long = folder.parent / ("m" * 120)
    folder.rename(long)
    (long / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": "n" * 300}))
    text = invoke("inspect", long, env={"COLUMNS": "80"}).stdout
    assert str(long / "model.safetensors") in text and "n" * 300 in text and "…" not in text


def test_the_demo_model_is_the_default(invoke):
    result = invoke("inspect", "--json")
    if "demo model is not installed" in result.stderr:
        pytest.skip("the demo extra is not installed")
    found = json.loads(result.stdout)
    assert (found["format"], found["architecture"], found["tokenizer"]) == ("gguf", "llama", "gpt2")
    assert found["parameters"] == 134_515_008 and list(found["elements"]) == ["Q4_1", "Q8_0", "F32"]
    assert found["chat_template_error"] is None and found["vocab_size"] == 49_152
    assert found["chat_template"] and found["license"] == "apache-2.0" and not found["remote_code"]


def test_what_is_no_model_fails_in_one_line(invoke, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    result = invoke("inspect", tmp_path / "x.gguf")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "x.gguf" in result.stderr
