import json
from pathlib import Path

import pytest
from support.headers import safetensors

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    config = {"model_type": "llama", "max_position_embeddings": 512, "auto_map": {"AutoModel": "evil.Model"}}
    (root / "config.json").write_text(json.dumps(config))
    header = {"model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    (root / "model.safetensors").write_bytes(safetensors(header, bytes(16)))
    (root / "tokenizer.json").write_text("{}")
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (root / "evil.py").write_text("raise SystemExit('remote code ran')")
    return root


def test_a_folder_is_described_and_its_code_never_run(invoke, folder):
    found = json.loads(invoke("inspect", folder, "--json").stdout)
    assert (found["format"], found["architecture"], found["parameters"]) == ("huggingface", "llama", 4)
    assert found["elements"] == {"F32": {"tensors": 1, "parameters": 4, "bytes": 16}}
    assert (found["tokenizer"], found["context_length"], found["license"]) == ("tokenizer.json", 512, None)
    assert found["remote_code"] is True and found["chat_template"] is True
    assert found["files"][0]["path"].endswith("model.safetensors") and "tensors" not in found
    text = invoke("inspect", folder).stdout
    assert "asked for, and never run" in text


def test_tensors_are_listed_when_asked_for(invoke, folder):
    (tensor,) = json.loads(invoke("inspect", folder, "--tensors", "--json").stdout)["tensors"]
    assert (tensor["element"], tensor["shape"], tensor["bytes"]) == ("F32", [4], 16)
    assert tensor["file"] == "model.safetensors" and tensor["offset"] > 8
    assert "norm" in invoke("inspect", folder, "--tensors").stdout


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", '{"chat_template": 7}'])
def test_a_broken_tokenizer_config_only_means_no_template(invoke, folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    assert json.loads(invoke("inspect", folder, "--json").stdout)["chat_template"] is False


def test_names_of_a_hostile_file_reach_no_terminal(invoke, folder):
    config = {"model_type": "llama", "_name_or_path": "\x1b]0;owned\x07[red]name"}
    (folder / "config.json").write_text(json.dumps(config))
    text = invoke("inspect", folder).stdout
    assert "\x1b" not in text and "[red]name" in text


def test_the_demo_model_is_the_default(invoke):
    pytest.importorskip("gguf")
    result = invoke("inspect", "--json")
    if "demo model is not installed" in result.stderr:
        pytest.skip("the demo extra is not installed")
    found = json.loads(result.stdout)
    assert (found["format"], found["architecture"], found["tokenizer"]) == ("gguf", "llama", "gpt2")
    assert found["parameters"] == 134_515_008 and list(found["elements"]) == ["Q4_1", "Q8_0", "F32"]
    assert found["chat_template"] and found["license"] == "apache-2.0" and not found["remote_code"]


def test_what_is_no_model_fails_in_one_line(invoke, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    result = invoke("inspect", tmp_path / "x.gguf")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "x.gguf" in result.stderr
