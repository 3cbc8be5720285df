"""The KV cache in less memory than it takes: the same bits as in all of it, for every family, prompts and decoding alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint
from test_engine import budget_at

import offload
from offload.cache_plan import CacheSizes, least_cache, share_cache
from offload.demand import Demand
from offload.errors import BudgetError, StorageError
from offload.plan import Plan
from offload.planning import full_budget, make_plan
from offload.units import PAGE

CTX = 1024
PROMPT = [7 * n % 250 for n in range(600)]  # two buckets whole, and a part
FAMILIES = ["llama", "gemma2", "gemma3_text", "phi3", "olmoe", "gpt_oss", "deepseek_v2", "glm4_moe"]
LARGE, QUANTIZED = ["llama"], {"kv_type_k": "q8_0", "kv_type_v": "q4_0"}
HEADS_OF_64 = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


def answers(model: Path, **options: object) -> tuple[list[np.ndarray], list[tuple[int, ...]], dict[str, int], int]:
    """Logits and tokens of an answer, of another that goes on from it, and of one that begins with a part of it."""
    with offload.load(model, ctx=CTX, **options) as engine:
        logits, tokens = [], []
        for prompt in (PROMPT, [*PROMPT, 5, 9, 11], [*PROMPT[:300], 1]):
            answer = engine.generate(prompt, max_tokens=20, temperature=0, ignore_eos=True, logprobs=4)
            tokens.append(answer.tokens)
            logits.append(np.array([[top.logprob for top in one.top] for one in answer.logprobs]))
        io = {edge: use.bytes for edge, use in engine.statistics().io.items()}
        return logits, tokens, io, engine.plan.kv_bytes


@pytest.mark.parametrize(
    ("family", "types"), [*((family, {}) for family in FAMILIES), *((f, QUANTIZED) for f in LARGE)]
)
def test_the_bits_are_the_same_whatever_part_of_the_cache_memory_holds(
    family: str, types: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized rows are padded, and rotated before they are stored."""
    model = tiny_checkpoint(family, tmp_path, **(HEADS_OF_64 if types else {}))
    expected, tokens, io, everything = answers(model, **types)
    assert set(io) == {"nvme->ram"}
    held = []
    for share, ram in ((0.8, 1.0), (0.0, 1.0), (0.4, 0.3)):
        monkeypatch.setattr("offload.opening.make_plan", budget_at(ram))
        with pytest.raises(BudgetError) as caught:
            answers(model, kv_ram=1, kv_dir=tmp_path / "spill", **types)
        least = caught.value.minimum_bytes
        kv_ram = least + int(share * (everything - least))
        logits, found, io, nbytes = answers(model, kv_ram=kv_ram, kv_dir=tmp_path / "spill", **types)
        assert found == tokens and all(map(np.array_equal, logits, expected))
        assert nbytes <= kv_ram and io["kv: nvme->ram"] > io["kv: ram->nvme"] > 0
        held.append(nbytes)
    assert held[1] <= held[2] <= held[0] < everything and held[1] < held[0]
    assert not list((tmp_path / "spill").iterdir()), "the file has no name"


@pytest.mark.parametrize("part", [0.4, 0.8])
def test_a_budget_that_the_cache_would_burst_keeps_it_on_disk(
    part: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint("llama", tmp_path)
    with offload.load(model, ctx=32768) as engine:
        everything = engine.plan.kv_bytes
        expected = engine.generate(PROMPT, max_tokens=4, temperature=0, ignore_eos=True).tokens

    def with_room(demand: Demand, _: int, __: int | None) -> Plan:
        """For everything but the cache, and a part of that: the process itself grows from test to test."""
        return make_plan(demand, full_budget(demand) - demand.fixed["kv"] + int(part * everything))

    monkeypatch.setattr("offload.opening.make_plan", with_room)
    with offload.load(model, ctx=32768, kv_dir=tmp_path) as engine:
        plan = engine.plan
        assert part / 2 < plan.kv_bytes / everything <= part and plan.used_bytes <= plan.budget_bytes
        assert plan.streamed_bytes_at(32768) > plan.streamed_bytes_at(0) == plan.streamed_bytes == 0
        assert engine.generate(PROMPT, max_tokens=4, temperature=0, ignore_eos=True).tokens == expected


def test_a_disk_that_fills_up_ends_the_answer_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint("llama", tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with offload.load(model, ctx=CTX, kv_ram="256KiB", kv_dir=tmp_path) as engine:
        monkeypatch.setattr("offload.tiers.spill.os.pwrite", full)
        with pytest.raises(StorageError, match=r"of the KV cache failed: No space left on device; free room") as caught:
            engine.generate(PROMPT, max_tokens=300, temperature=0, ignore_eos=True)
        assert "\n" not in str(caught.value)


@given(
    layers=st.integers(1, 40), heads=st.integers(1, 8), buckets=st.integers(1, 64), pages=st.integers(1, 4),
    share=st.floats(0, 1.2),
)  # fmt: skip
def test_as_many_layers_stay_as_fit(layers: int, heads: int, buckets: int, pages: int, share: float) -> None:
    sizes = CacheSizes(layers=layers, heads=heads, table_bytes=buckets * pages * PAGE, bucket_bytes=pages * PAGE)
    least = least_cache(sizes)
    nbytes = least + int(share * (sizes.nbytes - least))
    found = share_cache(sizes, nbytes)
    assert found.nbytes <= max(nbytes, least) and found.streamed <= frozenset(range(layers))
    assert found.streamed_bytes == len(found.streamed) * sizes.layer_bytes
    assert bool(found.streamed) == (nbytes < sizes.nbytes) == (found.ring_bytes > 0)
    if least < sizes.nbytes:
        with pytest.raises(BudgetError, match=rf"{least} bytes\) would do"):
            share_cache(sizes, least - 1)
