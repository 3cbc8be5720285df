"""An engine that answers from a script: what the command line needs of the real one, and nothing of its work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from offload.blocks import BlockKey
from offload.errors import ContextError, UsageError
from offload.results import Chunk, Completion, EdgeUse, Statistics, TierUse, Timings

GIB = 1024**3
ANSWER = "Paris is the capital of France."
IO = {"nvme->ram": EdgeUse(bytes=3 * GIB, busy_s=2.0)}
RESIDENCY = {"ram": TierUse(bytes=GIB, hit_rate=0.25)}


@dataclass(frozen=True)
class FakeDemand:
    """What of `offload.demand.Demand` is asked for."""

    disk_bps: float = 1.5e9
    kv_streamed_bytes: int = 0


@dataclass(frozen=True)
class FakePlan:
    """The fields of `offload.plan.Plan`."""

    budget_bytes: int = 3 * GIB
    minimum_bytes: int = GIB // 2
    model_bytes: int = 4 * GIB
    pinned_bytes: int = GIB
    streamed_bytes: int = 3 * GIB
    ring_bytes: int = GIB // 4
    kv_bytes: int = GIB // 8
    workspace_bytes: int = GIB // 16
    base_bytes: int = GIB // 8
    margin_bytes: int = GIB // 16
    embedding_bytes: int = GIB // 32
    edges: Mapping[str, float] = field(default_factory=lambda: {"nvme->ram": 1.5e9})
    compute_s: float = 0.2
    stream_s: float = 2.0
    predicted_tps: float = 0.5
    bound: str = "disk"
    ctx: int = 4096
    trained_ctx: int = 8192
    device_budget_bytes: int | None = None
    bank_slots: tuple[int, ...] = ()
    bank_bytes: int = 0
    device_slots: tuple[int, ...] = ()
    device_kv_bytes: int = 0
    host_kv: frozenset[int] = frozenset()
    missed_bytes: int = 0
    prefill_tokens_per_pass: int = 512
    demand: FakeDemand = field(default_factory=lambda: FakeDemand())
    placements: tuple[Any, ...] = (
        SimpleNamespace(key=BlockKey("weight", 0, "blk.0.ffn_up.weight"), tier="ram", nbytes=GIB),
        SimpleNamespace(key=BlockKey("weight", 1, "blk.1.ffn_up.weight"), tier="nvme", nbytes=3 * GIB),
    )

    def streamed_bytes_at(self, position: int) -> int:
        return self.streamed_bytes

    def predicted_tps_at(self, position: int) -> float:
        return self.predicted_tps


def with_budget(plan: FakePlan, nbytes: int) -> FakePlan:
    """As `offload.planning.with_budget`."""
    pinned = min(plan.model_bytes, max(0, nbytes - 2 * GIB))
    streamed = plan.model_bytes - pinned
    return replace(plan, budget_bytes=nbytes, pinned_bytes=pinned, streamed_bytes=streamed, predicted_tps=2.0)


class FakeStream:
    def __init__(self, engine: FakeEngine, text: str, options: dict[str, Any]) -> None:
        self.engine, self.options = engine, options
        self.words = [word + " " for word in text.split(" ")]
        self.words[-1] = self.words[-1][:-1]
        self.done: list[str] = []
        self.cancelled = False

    def __iter__(self) -> Iterator[Chunk]:
        if "on_prefill" in self.options:
            self.options["on_prefill"](1, 2)
            self.options["on_prefill"](2, 2)
        for index, word in enumerate(self.words[: self.options.get("max_tokens")]):
            time.sleep(self.engine.token_s)
            if self.cancelled:
                return
            if self.engine.failure is not None and index == self.engine.failure_at:
                raise self.engine.failure
            self.done.append(word)
            yield Chunk(text=word, tokens=(index,))

    def cancel(self) -> None:
        self.cancelled = True

    def result(self) -> Completion:
        reason = "cancelled" if self.cancelled else "stop" if len(self.done) == len(self.words) else "length"
        return Completion(
            text="".join(self.done),
            tokens=tuple(range(len(self.done))),
            finish_reason=reason,
            prompt_tokens=7,
            cached_tokens=0,
            timings=Timings(load_s=0.5, ttft_s=0.25, prefill_tps=35.0, decode_tps=5.4),
            logprobs=(),
            io=IO,
            residency=RESIDENCY,
            peak_rss_bytes=2 * GIB,
        )

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancelled = True


class FakeEngine:
    """`answers` are given in turn, the last one again and again; `prompts` and `options` record what was asked."""

    model_name = "fake-135M"
    ctx = 4096
    config = SimpleNamespace(architecture="llama", num_layers=2)
    tokenizer = SimpleNamespace(template="{{ messages }}")

    def __init__(
        self,
        *answers: str,
        token_s: float = 0.0,
        failure: Exception | None = None,
        failure_at: int = 0,
    ) -> None:
        self.answers = list(answers) or [ANSWER]
        self.token_s, self.failure, self.failure_at = token_s, failure, failure_at
        self.prompts: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.closed = False
        self.plan = FakePlan()
        self.traces: list[Path] = []

    def stream(self, prompt: str | Sequence[Any], **options: Any) -> FakeStream:
        if len(str(prompt)) > 100_000:
            raise ContextError("prompt has 9000 tokens, ctx is 4096", needed_tokens=9000, available_tokens=4096)
        self.prompts.append(deepcopy(prompt))
        self.options.append(options)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return FakeStream(self, answer, options)

    def generate(self, prompt: str | Sequence[Any], **options: Any) -> Completion:
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result()

    def statistics(self) -> Statistics:
        return Statistics(
            passes=12,
            tokens=10,
            compute_s=1.0,
            wait_s=3.0,
            other_s=0.1,
            bound="disk",
            io=IO,
            residency=RESIDENCY,
            kv_tokens=17,
            rss_bytes=GIB,
            peak_rss_bytes=2 * GIB,
        )

    def write_trace(self, path: Path) -> None:
        self.traces.append(path)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


class FakeEngineModule:
    """Stands for the module `offload.engine`. `loads` records the arguments."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.loads: list[dict[str, Any]] = []
        self.failure: Exception | None = None

    def load(self, path: Path, **options: Any) -> FakeEngine:
        if self.failure is not None:
            raise self.failure
        if options.get("ram") == "nonsense":
            raise UsageError("size 'nonsense': expected a number with a unit")
        self.loads.append({"path": path, **options})
        return self.engine

    def plan_model(self, path: Path, **options: Any) -> FakePlan:
        if self.failure is not None:
            raise self.failure
        self.loads.append({"path": path, **options})
        return self.engine.plan
