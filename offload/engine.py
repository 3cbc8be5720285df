"""The public engine: load a model under a budget, generate, stream, ask for logits, close."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from operator import index
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np

from offload.config import GenerationConfig, LoadConfig
from offload.errors import ClosedError, DeviceError, OffloadError, StorageError, UsageError
from offload.generate import Decoder, OnPrefill, generate
from offload.kernels.batch import Floats
from offload.loader import Runner, load_runner, plan_only
from offload.models.text.base import Tokenizer
from offload.models.text.template import render
from offload.opening import Progress
from offload.plan import Plan
from offload.prefetch.routing import RoutingTrace
from offload.recording import finish, recording
from offload.reporting import report_answer, report_totals, usage
from offload.requests import make_config, make_request
from offload.results import Chunk, Completion, Statistics
from offload.runtime import Driver, Stream, iterate
from offload.tiers.base import CancelToken
from offload.tiers.files import Storage
from offload.trace import write_trace

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


def load(
    path: str | Path,
    *,
    ram: str | int | None = None,
    vram: str | int | None = None,
    ctx: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    kv_type: str = "f16",
    kv_type_k: str | None = None,
    kv_type_v: str | None = None,
    kv_ram: str | int | None = None,
    kv_dir: str | Path | None = None,
    workers: int | None = None,
    expert_policy: str = "auto",
    prefetch: str = "auto",
    host_compute: str = "auto",
    skip_experts_below: float = 0.0,
    expert_pack: str | Path | None = None,
    coarse_experts_below: float = 0.0,
    trace: bool = False,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> Engine:
    """Opens a GGUF file or a Hugging Face folder and places its weights under the budget.

    Args:
        ram: bytes for the whole process: "3GiB", a number, "minimum", or None for what the machine has free.
        device: "auto" is a CUDA card where one can be used, else the CPU; or "cpu", "cuda", "cuda:1", "torch:cpu".
        vram: bytes on the device, for torch devices.
        kv_type: of the KV cache: "f16", "bf16", "f32", "q8_0" or "q4_0"; kv_type_k and kv_type_v name keys and values apart.
        progress: called as `progress(phase, done, total)` with bytes while weights are read.
        storage: how files are opened; tests inject faults here.

    Raises:
        CheckpointError: the file is malformed. UnsupportedError: nothing that this version runs.
        BudgetError: the budget is too small; its `minimum_bytes` would do. StorageError: the disk failed.
    """
    config = make_config(ram=ram, vram=vram, ctx=ctx, device=device, threads=threads, kv_type=kv_type,
                         kv_type_k=kv_type_k, kv_type_v=kv_type_v, kv_ram=kv_ram, kv_dir=kv_dir and Path(kv_dir),
                         workers=workers, expert_policy=expert_policy, prefetch=prefetch, host_compute=host_compute,
                         skip_experts_below=skip_experts_below, expert_pack=expert_pack and Path(expert_pack),
                         coarse_experts_below=coarse_experts_below, trace=trace)  # fmt: skip
    return Engine(path, config, storage=storage, progress=progress)


def plan_model(path: str | Path, **options: Any) -> Plan:
    """The plan that `load` with the same options would follow; reads headers only."""
    return plan_only(path, make_config(**options))


class Engine:
    """A loaded model. Share it freely: requests from several threads queue up. Use it as a context manager.

    But not with forked processes (`ClosedError`), nor with callbacks of its own requests (`UsageError`).
    """

    def __init__(
        self, path: str | Path, config: LoadConfig, *, storage: Storage | None = None, progress: Progress | None = None
    ) -> None:
        started = perf_counter()
        self.config = config
        self.model_name = Path(path).name
        self._driver = Driver()
        self._closing = threading.Lock()
        self._failure: OffloadError | None = None
        self._runner: Runner | None = None
        try:
            self._runner = self._driver.submit(
                lambda: load_runner(path, config, storage=storage, progress=progress)
            ).result()
        except BaseException:
            self._driver.close()
            raise
        self._decoder = Decoder(self._runner)
        self._load_s = perf_counter() - started

    # ---- asking

    def generate(self, prompt: Prompt, *, on_prefill: OnPrefill | None = None, **options: Any) -> Completion:
        """The whole answer to a text, token ids, or chat messages. Options: see `GenerationConfig`, `SamplingConfig`."""
        with self.stream(prompt, on_prefill=on_prefill, **options) as stream:
            return stream.result()

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        """The assistant's next message, through the model's chat template.

        Raises:
            UsageError: a plain text, which `generate` completes.
        """
        if isinstance(messages, str):  # type: ignore[unreachable]
            raise UsageError(
                "chat: give messages, such as [{'role': 'user', 'content': 'Hello'}]; generate takes a text"
            )
        return self.generate(messages, **options)

    def stream(self, prompt: Prompt, *, on_prefill: OnPrefill | None = None, **options: Any) -> Stream:
        """The answer as it grows. `on_prefill(done, total)` is called from the driver thread, and may not use the engine."""
        request, tokens = make_request(options), self._tokens(prompt)

        def job(cancel: CancelToken, emit: Callable[[Chunk], None]) -> Completion:
            return self._run(tokens, request, cancel, emit, on_prefill)

        return Stream(self._driver, job)

    def astream(self, prompt: Prompt, **options: Any) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: `async for chunk in engine.astream("text")`."""
        return iterate(self.stream(prompt, **options))

    def logits(self, tokens: Prompt) -> Floats:
        """Logits after every token of a prompt, float32 [num_tokens, vocab_size]."""
        ids, cancel = self._tokens(tokens), CancelToken()

        def work() -> Floats:
            self._check()
            rows: Floats = self._guard(lambda: self._decoder.all_logits(ids, cancel))
            return rows

        return self._driver.submit(work, cancel).result()

    def _stepwise_logits(self, ids: list[int]) -> Floats:
        cancel = CancelToken()

        def work() -> Floats:
            self._check()
            rows: Floats = self._guard(lambda: self._decoder.stepwise_logits(ids, cancel))
            return rows

        return self._driver.submit(work, cancel).result()

    def record_routing(self, prompt: Prompt, *, max_tokens: int = 0, origin: str = "", **options: Any) -> RoutingTrace:
        """What routers decide for a prompt, and for an answer to it of up to `max_tokens`.

        Without an answer the prompt is a text, each of whose tokens counts as if it had been decoded.

        Args:
            origin: where the tokens come from, for people. options: of the answer, see `generate`.

        Raises:
            UsageError: the model has no experts.
        """
        ids, request, cancel = self._tokens(prompt), make_request({**options, "max_tokens": max_tokens}), CancelToken()

        def work() -> RoutingTrace:
            self._check()
            runner = self._open_runner
            if not runner.opened.model.experts:
                raise UsageError(f"{self.model_name} has no experts, and so no routing to record")
            if self.config.skip_experts_below:
                raise UsageError("a trace is of all experts that routers choose: load without skip_experts_below")
            with recording(runner) as recorder:
                if max_tokens:
                    self._guard(lambda: generate(self._decoder, runner, ids, request, cancel, lambda _: None, None))
                else:
                    self._guard(lambda: self._decoder.all_logits(ids, cancel))
                return finish(recorder, runner, origin, by_themselves=not max_tokens)

        return self._driver.submit(work, cancel).result()

    def log_likelihood(self, tokens: Prompt, *, one_by_one: bool = False) -> Floats:
        """Of every token of a text but the first, given those before it: nats, float32 [num_tokens - 1].

        Perplexity is `exp(-mean)`.

        Args:
            one_by_one: computes each token by itself, as answers are, where trades of quality apply that spare prompts.
        """
        ids = self._tokens(tokens)
        logits = (self._stepwise_logits(ids) if one_by_one else self.logits(ids))[:-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(len(logits)), ids[1:]]
        likelihood: Floats = (chosen - np.log(np.exp(logits).sum(axis=-1))).astype(np.float32)
        return likelihood

    # ---- text

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None when it brings none: prompts are then token ids."""
        return self._open_runner.opened.tokenizer

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._need_tokenizer().encode(text, add_special=add_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids."""
        return self._need_tokenizer().decode(tokens)

    # ---- looking

    @property
    def plan(self) -> Plan:
        """Where every block lives, and the speed that follows."""
        return self._open_runner.plan

    @property
    def ctx(self) -> int:
        """Context length in tokens."""
        return self._open_runner.opened.ctx

    def statistics(self) -> Statistics:
        """Totals since the engine was loaded."""
        return report_totals(self._open_runner, kv_tokens=len(self._decoder))

    def write_trace(self, path: str | Path) -> None:
        """Writes the timeline for Perfetto.

        Raises:
            UsageError: the engine was loaded without `trace=True`. StorageError: the file cannot be written.
        """
        timeline = self._open_runner.telemetry.timeline
        if timeline is None:
            raise UsageError("no timeline was recorded: load with trace=True")
        write_trace(Path(path), list(timeline))

    # ---- closing

    def close(self) -> None:
        """Ends the running request's queue and frees memory, threads and files. Idempotent.

        The running request keeps its result, and is waited for. In a forked process there is nothing to free.

        Raises:
            UsageError: called from a callback of the running request.
        """
        if self._driver.inherited:
            return
        self._driver.check_thread()
        with self._closing:
            runner, self._runner = self._runner, None
            if runner is not None:
                self._driver.close(runner.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As `close`. After an error nobody wants the running request's result: it is cancelled."""
        if error is not None and not self._driver.inherited:
            self._driver.stop()
        self.close()

    # ---- inner

    @property
    def _open_runner(self) -> Runner:
        self._driver.check_process()
        if self._runner is None:
            raise ClosedError("the engine is closed; load the model again")
        return self._runner

    def _check(self) -> None:
        if self._failure is not None:
            raise ClosedError(f"the engine stopped after an error ({self._failure}); load the model again")

    def _guard(self, work: Callable[[], Any]) -> Any:
        """A disk or a device that fails leaves the engine closed for requests: weights may no longer arrive."""
        try:
            return work()
        except (StorageError, DeviceError) as error:
            self._failure = error
            raise

    def _run(
        self, tokens: Sequence[int], request: GenerationConfig, cancel: CancelToken,
        emit: Callable[[Chunk], None], on_prefill: OnPrefill | None,
    ) -> Completion:  # fmt: skip
        self._check()
        runner = self._open_runner  # the one that answers, even if `close` is called meanwhile
        before = usage(runner)
        runner.backend.set_cancel(cancel)
        try:
            answer = self._guard(lambda: generate(self._decoder, runner, tokens, request, cancel, emit, on_prefill))
        finally:
            runner.backend.set_cancel(None)
        return report_answer(runner, answer, before, load_s=self._load_s)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._need_tokenizer().encode(prompt, limit=self._open_runner.opened.ctx)
        if isinstance(prompt, bytes | bytearray):
            raise UsageError("prompt: bytes are no text; decode them first")
        try:
            items = list(prompt)
            is_chat = bool(items) and all(isinstance(item, Mapping) for item in items)
            ids = [] if is_chat else [index(item) for item in items]  # type: ignore[arg-type]
        except TypeError:
            raise UsageError("prompt: give a text, token ids, or chat messages") from None
        return self._render(items) if is_chat else ids

    def _render(self, messages: Sequence[Any]) -> list[int]:
        tokenizer = self._need_tokenizer()
        if tokenizer.template is None:
            raise UsageError(f"{self.model_name} has no chat template; give a plain text prompt instead")
        text = render(tokenizer.template, messages, special_strings=tokenizer.special_strings)
        return tokenizer.encode(text, add_special=False, limit=self._open_runner.opened.ctx)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(f"{self.model_name} brings no tokenizer; give the prompt as token ids")
        return self.tokenizer
