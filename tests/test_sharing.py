"""Rows of dense matrices that the host computes beside a device: the logits of the device alone, and less over the link."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import tiny_checkpoint
from support.gguf_checkpoints import SIZES_FOR_K_QUANTS, gguf_checkpoint
from test_engine import split_at

import offload
from offload.blocks import BlockKey
from offload.demand import shareable
from offload.engine import Engine
from offload.kernels.ggml.host_products import HostProducts
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model
from offload.prefetch.governor import Governor
from offload.sharing import Sharing

PROMPT = [7 * n % 250 for n in range(12)]


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link as fast as the host; a quarter of the way to all matrices on the device, all others in host memory."""
    monkeypatch.setattr("offload.device_place.has_second_processor", lambda device: True)
    monkeypatch.setattr("offload.demand.dense_rate", lambda model, rates: rates.link_bps)
    monkeypatch.setattr("offload.opening.make_plan", split_at(1.0, 0.25))


def step_logits(engine: Engine) -> np.ndarray:
    return engine._stepwise_logits(PROMPT)


def crossed(engine: Engine) -> int:
    copies: int = engine._runner.backend._tier.statistics().copies.bytes
    return copies


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "phi3", "deepseek_v2", "gpt_oss"])
def test_answers_are_those_of_the_device_alone_to_rounding(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint(family, tmp_path)  # float32: both processors compute what is stored
    computed: list[str] = []
    product = HostProducts.product
    monkeypatch.setattr(
        HostProducts, "product", lambda host, name, x: (computed.append(name), product(host, name, x))[1]
    )
    seen = []
    for way in ("off", "on"):
        with offload.load(model, ctx=64, kv_type="f32", device="torch:cpu", host_compute=way) as engine:
            answer = engine.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
            assert bool(computed) == (way == "on") and engine.plan.host_share == (0.5 if way == "on" else 0.0)
            seen.append((step_logits(engine), answer.tokens))
    assert np.abs(seen[1][0] - seen[0][0]).max() < 1e-4 * np.abs(seen[0][0]).max() and seen[1][1] == seen[0][1]


@pytest.mark.parametrize("element", ["Q4_K", "Q8_0", "F16"])
def test_a_step_has_only_its_part_cross_the_link_and_a_prompt_everything(element: str, tmp_path: Path) -> None:
    model = gguf_checkpoint("llama", tmp_path, element, **SIZES_FOR_K_QUANTS)
    with offload.load(model, ctx=64, device="torch:cpu", host_compute="on") as engine:
        plan = engine.plan
        moving = sum(place.nbytes for place in plan.placements if place.tier != "vram")
        assert 0 < plan.link_bytes < 0.8 * moving and plan.link_bytes + plan.shared_bytes >= moving
        before = crossed(engine)
        engine.logits(PROMPT)
        assert crossed(engine) - before >= moving
        engine.generate(PROMPT, max_tokens=4, temperature=0, ignore_eos=True)
        before = crossed(engine)
        engine.generate([*PROMPT, 1], max_tokens=1, temperature=0)  # one token behind what is cached
        engine._stepwise_logits(PROMPT)
        steps = (crossed(engine) - before) / len(PROMPT)
        assert steps < 1.25 * plan.link_bytes + 4096 * len(plan.placements)


def test_routers_and_matrices_of_each_head_are_the_devices(tmp_path: Path) -> None:
    model = build_model(open_checkpoint(gguf_checkpoint("deepseek_v2", tmp_path)), 64)
    others = model.matrices.keys() - shareable(model)
    assert others == {name for name in model.matrices if any(part in name for part in ("gate_inp", "k_b", "v_b"))}
    assert len(others) > 2


class Stream:
    def __init__(self) -> None:
        self.lengths: list[Mapping[BlockKey, int]] = []

    def shorten(self, nbytes: Mapping[BlockKey, int]) -> None:
        self.lengths.append(nbytes)


def test_rows_are_shared_in_steps_and_experts_in_prompts_too_unless_a_trial_says_otherwise() -> None:
    stream, nbytes = Stream(), {BlockKey("weight", 0, "blk.0.ffn_up.weight"): 4096}
    allowed = Governor(True)
    sharing = Sharing(allowed, stream, nbytes)  # type: ignore[arg-type]
    for tokens, rows in ((7, False), (1, True), (1, True), (9, False), (1, True)):
        sharing.begin(tokens)
        assert (sharing.rows, sharing.experts) == (rows, True)
        sharing.passed(tokens, 1.0)
    assert stream.lengths == [nbytes, {}, nbytes], "the ring begins anew only where it changes"
    never = Sharing(Governor(False), stream, nbytes)  # type: ignore[arg-type]
    for tokens, experts in ((1, False), (9, True)):
        never.begin(tokens)
        assert (never.rows, never.experts) == (False, experts)
    trial = Sharing(Governor(), stream, nbytes)  # type: ignore[arg-type]
    ways = []
    for _ in range(200):
        trial.begin(1)
        ways.append(trial.rows)
        trial.passed(1, 2.0 if trial.rows else 1.0)
        trial.begin(5)
        trial.passed(5, 0.1)
    assert ways[0] and not ways[-1], "what a trial shows to lose is left"
