"""Tokens whose kernels are recorded once and replayed: the bits of kernels launched one by one, whatever moves between.

`support.tape` stands in for CUDA graphs on the CPU; where there is a card, the same runs on it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import FAMILIES, LLAMA3_SCALING, tiny_checkpoint
from support.fp8_checkpoints import fp8_checkpoint
from support.running import PlainRunner, read_bytes, read_vector
from support.tape import TapeRecorder
from test_engine import split_at
from torch.utils._python_dispatch import _get_current_dispatch_mode

import offload
from offload.blocks import BlockKey
from offload.demand import Demand
from offload.elements import kv_types
from offload.errors import Cancelled
from offload.kernels.batch import MicroBatch
from offload.kernels.torch.backend import TorchBackend
from offload.kernels.torch.graphs import LENGTHS_KEPT, CudaRecorder, Graphs, Recorder
from offload.kernels.torch.ops import on_host
from offload.kernels.torch.products import DecodedProducts
from offload.kernels.torch.token import POOL_SLACK_BYTES, graph_nbytes
from offload.models.base import Model
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model
from offload.plan import Plan
from offload.planning import make_plan
from offload.tiers.base import CancelToken
from offload.tiers.vram import DeviceTier
from offload.units import MIB

CTX = 600
PROMPT = [7 * n % 250 for n in range(200)]


def recorder(device: str) -> Recorder:
    return CudaRecorder(torch.device(device)) if device == "cuda" else TapeRecorder()


def answers(
    model: Path, device: str, given: Recorder | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray]:
    """A long answer, one after a prompt that goes back into it, and all logits of both."""
    seen: list[np.ndarray] = []
    with monkeypatch.context() as patch:
        patch.setattr("offload.kernels.torch.backend.recorder_for", lambda _: given)
        logits = TorchBackend.logits
        patch.setattr(TorchBackend, "logits", lambda *args: (seen.append(logits(*args)), seen[-1])[1])
        name = "torch:cpu" if device == "cpu" else device
        with offload.load(model, ctx=CTX, device=name, threads=1) as engine:
            first = engine.generate(PROMPT, max_tokens=330, temperature=0, ignore_eos=True).tokens
            prompt = [*PROMPT, *first[:40], 3, 4, 5]
            second = engine.generate(prompt, max_tokens=20, temperature=0, ignore_eos=True).tokens
    return first, second, np.concatenate(seen)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe in FP8"])
def test_replayed_tokens_have_the_bits_of_computed_ones(
    family: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across two buckets of the cache, a prompt, and back in the first; a sliding window is passed on the way."""
    if family == "qwen3_moe in FP8":
        model = fp8_checkpoint("qwen3_moe", tmp_path, max_position_embeddings=CTX).folder
    else:
        model = tiny_checkpoint(family, tmp_path, max_position_embeddings=CTX)
    given = recorder(device)
    expected, found = (answers(model, device, how, monkeypatch) for how in (None, given))
    assert found[:2] == expected[:2] and np.isfinite(found[2]).all()
    assert np.array_equal(found[2], expected[2])
    if isinstance(given, TapeRecorder):
        assert given.replays > 330


def test_pieces_that_wait_for_blocks_run_between_graphs(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny_checkpoint("llama", tmp_path, max_position_embeddings=CTX), recorder(device)
    monkeypatch.setattr("offload.opening.make_plan", split_at(0.5, 0.7))
    expected, found = (answers(model, device, how, monkeypatch) for how in (None, given))
    assert found[:2] == expected[:2] and np.array_equal(found[2], expected[2])
    if isinstance(given, TapeRecorder):
        assert given.replays > 330


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v2"])
def test_layers_that_the_host_attends_to_run_between_graphs(
    family: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny_checkpoint(family, tmp_path, max_position_embeddings=CTX), recorder(device)
    expected = answers(model, device, None, monkeypatch)

    def mixed(demand: Demand, ram: int, vram: int | None) -> Plan:
        assert demand.kv is not None
        need = demand.with_host_kv(frozenset(range(0, len(demand.kv.reaches), 2)))
        return make_plan(replace(need, kv=None), ram, vram)

    def fetched(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert _get_current_dispatch_mode() is None, "a card refuses to fetch anything while it records"
        return on_host(*tensors)

    monkeypatch.setattr("offload.kernels.torch.ops.on_host", fetched)
    monkeypatch.setattr("offload.opening.make_plan", mixed)
    plain, found = (answers(model, device, how, monkeypatch) for how in (None, given))
    assert found[:2] == plain[:2] and np.array_equal(found[2], plain[2])
    if isinstance(given, TapeRecorder):
        assert given.replays > 330
        assert np.array_equal(found[2], expected[2])


class Driven:
    """A backend by hand. Matrices may be moved at any time; streamed ones are somewhere else each time."""

    def __init__(self, model: Model, device: str, given: Recorder | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.tier = model, DeviceTier(device, 64 * MIB)
        with monkeypatch.context() as patch:
            patch.setattr("offload.kernels.torch.backend.recorder_for", lambda _: given)
            self.backend = TorchBackend(model, CTX, self.tier, threads=1, kv_types=kv_types("f16"))
        self.embedding = PlainRunner(model, CTX).embedding.numpy()
        self.vectors = {name: read_vector(vector).numpy() for name, vector in model.vectors.items()}
        self.keys = [BlockKey("weight", stage.layer, name) for stage in model.stages for name in stage.matrices]
        self.bytes = {key: np.frombuffer(read_bytes(model.matrices[key.name].extent), np.uint8) for key in self.keys}
        self.places = {key: [self.tier.allocate(raw.nbytes) for _ in range(2)] for key, raw in self.bytes.items()}
        for name, values in self.vectors.items():
            self.backend.place_vector(name, values)
        self.stream([])

    def move(self, key: BlockKey) -> None:
        """To its other place; where it was is spoiled."""
        old, new = self.places[key]
        self.places[key] = [new, old]
        self.tier.view(new, self.bytes[key].nbytes).copy_(torch.from_numpy(self.bytes[key].copy()))
        self.tier.view(old, self.bytes[key].nbytes).fill_(0xFF)
        self.backend.place(key, new)

    def change(self, some: str) -> None:
        for name in {some, *(name for name in self.vectors if name.startswith("rope"))}:
            self.vectors[name] = self.vectors[name] * np.float32(1.01)
            self.backend.place_vector(name, self.vectors[name])

    def stream(self, streamed: list[BlockKey]) -> None:
        for key in self.keys:
            self.move(key)
        self.pieces = self.backend.schedule(frozenset(streamed))

    def forward(self, start: int, tokens: int) -> np.ndarray:
        ids = [(11 * n + 3) % 300 for n in range(start, start + tokens)]
        self.backend.begin([MicroBatch(start, tokens, (tokens - 1,))], self.embedding[ids])
        for number, piece in enumerate(self.pieces):
            for key in piece.streamed:
                self.move(key)
            self.backend.run(number, 0)
        return self.backend.logits(0)


@pytest.fixture(params=["gemma3_text"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    scaling = {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 1e4}} if request.param == "llama" else {}
    model = build_model(open_checkpoint(tiny_checkpoint(request.param, tmp_path, **scaling)), CTX)
    return replace(model, parts={name: (matrix,) for name, matrix in model.matrices.items()})


@pytest.fixture
def drive(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Driven]]:
    opened: list[Driven] = []

    def drive(device: str, given: Recorder | None) -> Driven:
        opened.append(Driven(model, device, given, monkeypatch))
        return opened[-1]

    yield drive
    for driven in opened:
        driven.backend.close()
        driven.tier.close()


@pytest.mark.parametrize("model", ["gemma3_text", "llama"], indirect=True)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_moves_between_tokens_is_seen(drive: Callable[..., Driven], device: str, seed: int) -> None:
    chance, given = random.Random(seed), recorder(device)
    plain, replayed = drive(device, None), drive(device, given)
    position = 0
    for _ in range(100):
        kind = chance.choice(["token"] * 12 + ["prompt", "jump", "move", "change", "stream"])
        if kind == "jump" or position > CTX - 9:
            position = chance.choice([0, position // 2, 250, 500])
        key, name = chance.choice(plain.keys), chance.choice(list(plain.vectors))
        streamed = chance.sample(plain.keys, chance.choice([0, 0, 1, 5]))
        for driven in (plain, replayed):
            if kind == "move":
                driven.move(key)
            elif kind == "change":
                driven.change(name)
            elif kind == "stream":
                driven.stream(streamed)
        tokens = 1 if kind != "prompt" else 9
        plain.backend._token = None  # nothing is known from one token to the next
        assert np.array_equal(*(driven.forward(position, tokens) for driven in (plain, replayed))), (kind, position)
        position += tokens
    if isinstance(given, TapeRecorder):
        assert given.replays > 40


def test_a_token_is_cancelled_between_graphs_and_while_one_is_recorded(
    drive: Callable[..., Driven], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recorder(device)
    plain, replayed = drive(device, None), drive(device, given)
    for position in range(5):
        replayed.backend.set_cancel(token := CancelToken())
        replayed.backend.begin([MicroBatch(position, 1, (0,))], replayed.embedding[[3]])
        token.cancel()
        with pytest.raises(Cancelled):
            replayed.backend.run(0, 0)
        replayed.backend.set_cancel(token := CancelToken())
        attention = type(replayed.model.stages[2])
        forward = attention.forward
        with monkeypatch.context() as patch:  # where kernels are replayed, nothing is called and nothing looks
            patch.setattr(attention, "forward", lambda *args, t=token, f=forward: (t.cancel(), f(*args))[1])
            try:
                replayed.forward(position, 1)
            except Cancelled:
                assert position < 4
        replayed.backend.set_cancel(None)
        assert np.array_equal(replayed.forward(position, 1), plain.forward(position, 1))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: not\npermitted"), torch.OutOfMemoryError("full")])
def test_what_cannot_be_recorded_is_computed_for_good_and_told_once(
    drive: Callable[..., Driven], caplog: pytest.LogCaptureFixture, error: RuntimeError
) -> None:
    given = TapeRecorder()
    plain, replayed = drive("cpu", None), drive("cpu", given)
    replayed.stream([replayed.keys[5]])
    caplog.set_level(logging.WARNING, "offload")
    for position in range(12):
        given.refuses = error if position == 1 else None
        assert np.array_equal(replayed.forward(position, 1), plain.forward(position, 1))
    (warning,) = caplog.records
    told = "CUDA error: not" if "CUDA" in str(error) else "full"
    assert warning.getMessage().endswith(
        f"as a CUDA graph ({told}) and are launched one by one, which is slower; nothing else changes"
    )
    assert len(given.tapes) == 1, "of positions, which the second token has made known"
    given.replays = 0
    replayed.stream([])
    for position in range(4):
        replayed.forward(position, 1)
    assert given.replays > 0 and len(caplog.records) == 1


@pytest.mark.parametrize("model", ["gemma3_text", "gpt_oss", "deepseek_v2"], indirect=True)
def test_what_a_tokens_pieces_take_at_a_time_is_within_what_is_planned(drive: Callable[..., Driven]) -> None:
    driven = drive("cpu", None)
    driven.forward(CTX - 3, 2)
    driven.forward(CTX - 1, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        driven.backend.begin([MicroBatch(CTX - 1, 1, (0,))], driven.embedding[[5]])
        driven.backend.run(0, 0)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    allowed = graph_nbytes(driven.model, CTX, DecodedProducts()) - POOL_SLACK_BYTES
    assert 4 * max(matrix.num_elements for matrix in driven.model.matrices.values()) <= most <= allowed


class Counting:
    """A recorder of nothing: `log` holds what was asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def record(self, work: Callable[[], None]) -> Any:
        self.log.append("record")
        return self

    def replay(self) -> None:
        self.log.append("replay")

    def wait(self) -> None:
        self.log.append("wait")


def test_a_piece_is_warmed_up_recorded_and_replayed_for_each_length_and_few_lengths_are_kept() -> None:
    made = Counting()
    graphs, work = Graphs(made), lambda: made.log.append("work")

    def run(*lengths: int) -> list[str]:
        made.log.clear()
        for length in lengths:
            graphs.run("piece", length, work)
        return made.log

    assert run(1, 1, 1) == ["work", "record", "replay", "replay"]
    assert run(2, 2) == ["work", "record", "replay"]
    assert LENGTHS_KEPT == 2 and run(1, 2, 1) == ["replay"] * 3
    assert run(3, 1, 3) == ["wait", "work", "replay", "record", "replay"]
    assert run(2, 3) == ["wait", "work", "replay"], "what was used last is kept"
    graphs.forget()
    assert made.log[-1] == "wait" and run(1, 1) == ["work", "record", "replay"]
    graphs = Graphs(None)
    assert run(1, 1, 1) == ["work"] * 3


def test_a_graph_reads_memory_anew_and_nothing_else(device: str) -> None:
    """The contract that everything else rests on: what stands in for a card, and the card."""
    given = recorder(device)
    x, out, number = torch.ones(3, device=device), torch.zeros(3, device=device), 1.0

    def work() -> None:
        out.add_(x * number)

    work()
    graph = given.record(work)
    assert out.tolist() == [1, 1, 1], "nothing is computed while it is recorded"
    number = 5.0
    x.fill_(2)
    graph.replay()
    graph.replay()
    assert out.tolist() == [5, 5, 5]
    with pytest.raises(RuntimeError, match="capturing"):
        given.record(lambda: out.fill_(x.sum().item()))
    again = given.record(work)
    again.replay()
    given.wait()
    assert out.tolist() == [15, 15, 15]
