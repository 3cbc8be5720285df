"""Experts that the host computes beside a device: the logits of either alone, to rounding, and cancelled as fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import tiny_checkpoint
from support.gguf_checkpoints import gguf_checkpoint

import offload
from offload.blocks import ExpertKey
from offload.errors import BackendError
from offload.kernels.ggml.host_products import HostProducts
from offload.prefetch.trace_file import write_routing
from offload.processors import Processors
from offload.tuning import popularity, trace_path

PROMPT = [7 * n % 250 for n in range(40)]
SHARES: dict[str, Callable[..., tuple[float, float]]] = {
    "all on the host": lambda self, nbytes, tokens: (1.0, 0.0),
    "all on the device": lambda self, nbytes, tokens: (0.0, 1.0),
    "half": lambda self, nbytes, tokens: (1.0, 1.0),
    "by what it costs": Processors.costs,
}


def hold(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Has the device hold this share of the experts of each bank."""
    monkeypatch.setattr(
        "offload.planning.share_device", lambda banks, available: tuple(int(share * bank.num_experts) for bank in banks)
    )


def answers(model: Path, **options: object) -> tuple[np.ndarray, tuple[int, ...]]:
    with offload.load(model, ctx=64, kv_type="f32", **options) as engine:
        return engine.logits(PROMPT), engine.generate(PROMPT[:5], max_tokens=6, temperature=0, ignore_eos=True).tokens


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v2"])
def test_wherever_experts_are_computed_the_answer_is_the_same(
    family: str, share: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint(family, tmp_path)  # float32: both processors compute what is stored
    expected = answers(model)
    monkeypatch.setattr("offload.device_place.has_second_processor", lambda device: True)
    monkeypatch.setattr(Processors, "costs", SHARES[share])
    hold(monkeypatch, 0.0)
    logits, tokens = answers(model, device="torch:cpu")
    assert np.abs(logits - expected[0]).max() < 1e-4 * np.abs(expected[0]).max() and tokens == expected[1]


def test_the_host_computes_what_it_is_given_and_the_device_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gguf_checkpoint("olmoe", tmp_path, "Q8_0")
    monkeypatch.setattr("offload.device_place.has_second_processor", lambda device: True)
    monkeypatch.setattr(Processors, "costs", SHARES["half"])
    hold(monkeypatch, 0.0)
    with offload.load(model, ctx=64, device="torch:cpu") as engine:
        experts = engine._runner.backend.experts
        host, device = [], []
        for name, seen in (("_compute_on_host", host), ("_compute_here", device)):
            original = getattr(experts, name)
            monkeypatch.setattr(experts, name, lambda *given, f=original, s=seen: (s.append(len(given[-1])), f(*given)))
        engine.generate(PROMPT[:3], max_tokens=8, temperature=0, ignore_eos=True)
    assert sum(host) > 0 and sum(device) > 0 and abs(sum(host) - sum(device)) <= len(host)


def test_the_hosts_part_counts_in_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gguf_checkpoint("olmoe", tmp_path, "Q8_0")
    with offload.load(model, ctx=64, device="torch:cpu") as engine:
        alone = engine.plan.workspace_bytes
    monkeypatch.setattr("offload.device_place.has_second_processor", lambda device: True)
    with offload.load(model, ctx=64, device="torch:cpu") as engine:
        experts, products = (
            engine._runner.backend.experts._helper.experts,
            HostProducts.nbytes(engine._runner.opened.model),
        )
        assert engine.plan.workspace_bytes == alone + experts.nbytes + products


@pytest.mark.parametrize(("family", "element"), [("olmoe", "Q8_0"), ("gpt_oss", "MXFP4"), ("deepseek_v2", "F16")])
def test_experts_that_a_device_holds_give_the_bits_of_copies_and_are_never_read(
    family: str, element: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, read = gguf_checkpoint(family, tmp_path, element), [], []
    for share in (0.0, 0.4, 1.0):
        hold(monkeypatch, share)
        with offload.load(model, ctx=64, kv_type="f32", device="torch:cpu", ram="minimum") as engine:
            for bank in engine._runner.scheduler._experts._banks.values() if share < 1 else ():
                assert not bank._held.keys() & bank._resident.keys(), "no slot is spent on what the device holds"
            before = engine.statistics().io["nvme->ram"].bytes
            logits = engine.logits(PROMPT)
            seen.append((logits, engine.generate(PROMPT[:5], max_tokens=6, temperature=0, ignore_eos=True).tokens))
            read.append(engine.statistics().io["nvme->ram"].bytes - before)
            found = {tier: use.bytes for tier, use in engine.statistics().residency.items()}
            assert min(found.values()) >= 0 and found["vram"] >= engine.plan.device_bank_bytes_held
            assert engine.plan.missed_bytes > 0 or share == 1.0
    for logits, tokens in seen[1:]:
        assert np.array_equal(logits, seen[0][0]) and tokens == seen[0][1]
    assert read[0] > read[1] > read[2]
    assert read[2] < 64 * 1024, "rows of the token table at most"


def test_a_device_holds_what_a_trace_shows_to_be_popular(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.tuning.user_cache_path", lambda name: tmp_path / name)
    model = gguf_checkpoint("olmoe", tmp_path, "Q8_0")
    with offload.load(model, ctx=64) as engine:
        trace = engine.record_routing(PROMPT)
    write_routing(trace_path(trace.model), trace)
    counts = popularity(trace.model)
    assert sum(counts.values()) == trace.choices.size
    hold(monkeypatch, 0.25)
    with offload.load(model, ctx=64, device="torch:cpu") as engine:
        bank = next(iter(engine._runner.scheduler._experts._banks.values()))
        least = min(counts.get(key, 0) for key in bank._held)
        others = [counts.get(ExpertKey(layer.layer, e), 0) for layer in bank.spec.layers for e in range(len(layer.experts))
                  if ExpertKey(layer.layer, e) not in bank._held]  # fmt: skip
        assert bank._held and least >= max(others) and least > 0
    trace_path(trace.model).write_bytes(b"not a trace")
    assert popularity(trace.model) == {}


def test_a_device_budget_is_kept_whatever_it_holds(tmp_path: Path) -> None:
    model = gguf_checkpoint("olmoe", tmp_path, "Q8_0")
    with offload.load(model, ctx=64, device="torch:cpu") as engine:
        need, expected = engine.plan.demand, answers(model, device="torch:cpu")
    fixed, dense = sum(need.device_fixed.values()), sum(block.footprint for block in need.blocks)
    experts = sum(bank.num_experts * bank.device_bytes for bank in need.banks)
    held = []
    for share in (0.0, 0.1, 0.35, 0.6, 0.85, 1.1):
        vram = fixed + dense + int(share * experts) + 4096
        with offload.load(model, ctx=64, kv_type="f32", device="torch:cpu", vram=vram) as engine:
            tier = engine._runner.backend._tier
            assert sum(engine.plan.demand.device_fixed.values()) + tier.capacity_bytes <= vram
            assert tier.statistics().allocated_bytes <= tier.capacity_bytes
            held.append(sum(engine.plan.device_slots))
            logits = engine.logits(PROMPT)
        assert np.array_equal(logits, expected[0])
    assert held == sorted(held) and held[0] == 0 and held[-1] == sum(bank.num_experts for bank in need.banks)


@pytest.mark.parametrize(
    ("cuda", "devices", "device", "words"),
    [
        (None, 0, "cuda", "built without CUDA; install one with it"),
        ("12.8", 0, "cuda:0", "finds no CUDA device that its driver can use; check nvidia-smi"),
        ("12.8", 1, "cuda:1", "there are 1 CUDA devices; choose cuda:0"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    cuda: str | None, devices: int, device: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    with pytest.raises(BackendError, match=words) as caught:
        offload.load(tiny_checkpoint("llama", tmp_path), ctx=64, device=device)
    assert "\n" not in str(caught.value)
