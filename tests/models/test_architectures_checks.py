"""What a family's file may get wrong, and the one line that says so."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FAMILIES as TESTED
from support.checkpoints import FAMILIES as TINY_FAMILIES
from support.checkpoints import tiny_checkpoint
from transformers import AutoConfig

from offload.elements import element_type
from offload.errors import CheckpointError, OffloadError, UnsupportedError
from offload.models.checkpoint import open_checkpoint
from offload.models.checkpoint.base import Checkpoint, TensorInfo
from offload.models.parts import head_parts
from offload.models.registry import FAMILIES, build_model, default_context


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint("llama", tmp_path_factory.mktemp("llama")))


def configured(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    return replace(checkpoint, metadata={**checkpoint.metadata, **changes})


def reshaped(checkpoint: Checkpoint, name: str, **changes: Any) -> Checkpoint:
    tensors: Mapping[str, TensorInfo] = checkpoint.tensors
    return replace(checkpoint, tensors={**tensors, name: replace(tensors[name], **changes)})


def test_every_family_is_tested() -> None:
    assert set(FAMILIES) - {"gemma3"} == set(TINY_FAMILIES)  # gemma3 is gemma3_text in GGUF


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    config = AutoConfig.for_model(family)
    for key, value in FAMILIES[family].defaults.items():
        assert getattr(config, key) == value or (key == "sliding_window" and not config.use_sliding_window), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a positive integer"),
        ({"num_hidden_layers": 10**6}, "1000000 layers are declared, but the file has only"),
        ({"num_hidden_layers": 4}, r"tensor blk\.3\.attn_norm\.weight is missing"),
        ({"num_attention_heads": "8"}, "num_attention_heads is '8'"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": [4, 4]}, r"num_attention_heads is \[4, 4\]"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"head_dim": 15}, "heads of 15 features cannot be rotated"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
        ({"hidden_size": 128}, r"attn_norm\.weight has shape \(64,\); the model's sizes demand \(128,\)"),
        ({"intermediate_size": 97}, r"ffn_gate\.weight has shape \(96, 64\); the model's sizes demand \(97, 64\)"),
        ({"vocab_size": 319}, r"token_embd\.weight has shape \(320, 64\).*\(319, 64\)"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a positive number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        ({"rope_parameters": 7}, "rope_parameters is 7; expected an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor 4.0 must be below",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "longrope has 1 factors; 8 are needed",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, "x"]}}, "expected a list of positive"),
    ],
)
def test_senseless_numbers_are_refused(llama: Checkpoint, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_model(configured(llama, **changes), 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "activation 'relu' is not one of"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'; use the original weights or a GGUF"),
        ({"rope_parameters": {"rope_type": "mystery"}}, "rope scaling 'mystery'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_is_not_implemented_is_named(llama: Checkpoint, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        build_model(configured(llama, **changes), 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "\x1b[2J" * 10_000},
        {"quantization_config": {"quant_method": "\x1b[2J" * 10_000}},
        {"rope_parameters": {"rope_type": "\x1b[2J" * 10_000}},
        {"layer_types": ["\x1b[2J" * 10_000] * 2, "sliding_window": 8, "use_sliding_window": True},
        {"rms_norm_eps": ["\x1b[2J\u202e" * 100] * 10_000},
    ],
)
def test_whatever_a_value_is_the_error_is_one_short_line(llama: Checkpoint, changes: dict[str, Any]) -> None:
    model = configured(llama, **changes)
    with pytest.raises(OffloadError) as caught:
        build_model(replace(model, architecture="qwen2" if "layer_types" in changes else "llama"), 64)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500 + len(str(model.path))


NASTY = (None, True, -1, 0, 3, 2**40, 10**400, 0.5, 1e-320, 1e308, float("inf"), "x", [], [[]], [1, 2, 3], {}, {"a": 1})
ROPE_KEYS = (
    "rope_theta",
    "factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
)
ROPE_KEYS += ("original_max_position_embeddings", "partial_rotary_factor", "short_factor", "long_factor", "rope_type")


@pytest.mark.parametrize("family", TESTED)
def test_no_value_of_any_key_breaks_more_than_the_load(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(family, tmp_path, num_hidden_layers=2, layer_types=None))
    scaling = {"factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    ropes = [scaling | {"rope_type": kind} for kind in ("default", "linear", "llama3", "longrope", "yarn")]
    hostile = [configured(checkpoint, **{key: value}) for key in checkpoint.metadata for value in NASTY]
    for rope in ropes:
        for key in ROPE_KEYS:
            hostile += [configured(checkpoint, rope_parameters=rope | {key: value}) for value in NASTY]
    for model in hostile:
        with contextlib.suppress(OffloadError):
            build_model(model, 64)


def test_unknown_architecture_lists_the_known(llama: Checkpoint) -> None:
    for ask in (lambda model: build_model(model, 64), default_context):
        with pytest.raises(
            UnsupportedError, match=r"'mamba' is not supported; this version runs .*gemma2.*llama.*smollm3"
        ):
            ask(replace(llama, architecture="mamba"))


def test_missing_tensor_is_named(llama: Checkpoint) -> None:
    tensors = {name: tensor for name, tensor in llama.tensors.items() if "layers.1.mlp.down" not in name}
    with pytest.raises(CheckpointError, match=r"tensor blk\.1\.ffn_down\.weight is missing; llama needs it") as caught:
        build_model(replace(llama, tensors=tensors), 64)
    assert caught.value.tensor == "blk.1.ffn_down.weight"
    assert caught.value.path == str(llama.path)


def test_unknown_tensors_are_ignored(llama: Checkpoint) -> None:
    extra = replace(llama.tensors["lm_head.weight"], name="model.layers.0.self_attn.rotary_emb.inv_freq")
    assert build_model(replace(llama, tensors={**llama.tensors, extra.name: extra}), 64).matrices


def test_a_tensor_stored_under_two_names_is_refused(llama: Checkpoint) -> None:
    twin = replace(llama.tensors["lm_head.weight"], name="model.lm_head.weight")
    with pytest.raises(CheckpointError, match=r"output\.weight is stored twice"):
        build_model(replace(llama, tensors={**llama.tensors, twin.name: twin}), 64)


def test_promised_biases_must_be_there(llama: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"attn_q\.bias is missing"):
        build_model(configured(llama, attention_bias=True), 64)


def test_rank_and_type_of_tensors_are_checked(llama: Checkpoint) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match=r"attn_q\.weight has shape \(64, 8, 8\); expected 2 dimensions"):
        build_model(reshaped(llama, name, shape=(64, 8, 8)), 64)
    with pytest.raises(UnsupportedError, match=r"attn_q\.weight: weights of type I32"):
        build_model(reshaped(llama, name, element=element_type("I32")), 64)
    with pytest.raises(UnsupportedError, match=r"output_norm\.weight: a vector of type Q8_0"):
        build_model(reshaped(llama, "model.norm.weight", element=element_type("Q8_0")), 64)


def test_stages_name_their_matrices_in_order(llama: Checkpoint) -> None:
    model = build_model(llama, 64)
    names = [stage.name for stage in model.stages]
    assert names[:2] == ["blk.0.attention", "blk.0.feed_forward"]
    assert names[-1] == "head.0" and model.head_parts == 1 and len(names) == 2 * 3 + 1
    assert [stage.layer for stage in model.stages] == [0, 0, 1, 1, 2, 2, -1]
    used = [name for stage in model.stages for name in stage.matrices]
    assert sorted(used) == sorted(model.matrices) and len(set(used)) == len(used)
    assert model.stages[0].matrices == tuple(f"blk.0.attn_{part}.weight" for part in ("q", "k", "v", "output"))


def test_a_large_head_is_split_into_parts(llama: Checkpoint) -> None:
    head = llama.tensors["lm_head.weight"]  # 320 rows of 256 bytes
    parts = head_parts(head, most_bytes=130 * head.row_nbytes)
    assert list(parts) == ["output.weight[0]", "output.weight[1]", "output.weight[2]"]
    assert [part.shape[0] for part in parts.values()] == [128, 128, 64]
    assert [part.extent.offset - head.extent.offset for part in parts.values()] == [0, 128 * 256, 256 * 256]
    assert list(head_parts(head, most_bytes=head.nbytes)) == ["output.weight"]
    assert all(part.shape[0] <= 64 for part in head_parts(head, most_bytes=1).values())


def test_parts_of_a_head_give_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.running import PlainRunner

    checkpoint = open_checkpoint(tiny_checkpoint("granite", tmp_path))
    whole = PlainRunner(build_model(checkpoint, 64), 64).logits([1, 2, 3])
    monkeypatch.setattr("offload.models.assembly.head_parts", lambda head: head_parts(head, 64 * head.row_nbytes))
    model = build_model(checkpoint, 64)
    assert model.head_parts == 5
    assert (PlainRunner(model, 64).logits([1, 2, 3]) - whole).abs().max() < 1e-5
