"""From a path to something that runs: open, describe, plan, allocate, read. The reverse order on close.

What it loads is a `Runner`: a model whose weights are where the plan wants them, ready for forward passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from offload.config import LoadConfig
from offload.demand import Rates, compute_seconds, make_demand, model_blocks
from offload.elements import element_type
from offload.embedding import EmbeddingTable
from offload.errors import UsageError
from offload.kernels.batch import Floats
from offload.kernels.ggml.backend import GgmlBackend
from offload.kernels.ggml.dequantize import dequantize
from offload.kernels.ggml.probe import measure_kernel
from offload.machine import load_machine
from offload.models.base import Model, Vector
from offload.models.checkpoint import open_checkpoint
from offload.models.checkpoint.base import Checkpoint
from offload.models.registry import build_model, default_context
from offload.models.text import open_tokenizer
from offload.models.text.base import Tokenizer
from offload.plan import Demand, Plan, make_plan, minimum_budget
from offload.residency import Residency
from offload.scheduler import Scheduler, make_steps
from offload.stream import BlockStream
from offload.telemetry import Telemetry
from offload.tiers.base import OnRead
from offload.tiers.cgroup import available_memory
from offload.tiers.files import LocalStorage, Storage
from offload.tiers.nvme import NvmeReader
from offload.tiers.probe import measure_disk
from offload.tiers.ram import Slab
from offload.units import GIB, MIB, align_up

DEFAULT_CTX = 4096
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint described, before any memory is planned."""

    checkpoint: Checkpoint
    model: Model
    tokenizer: Tokenizer | None
    ctx: int
    threads: int


def open_model(path: str | Path, config: LoadConfig) -> Opened:
    """Reads headers and the tokenizer, and describes the model.

    Raises:
        CheckpointError, UnsupportedError: the file is malformed, or nothing that this version runs.
    """
    checkpoint = open_checkpoint(path)
    trained = default_context(checkpoint)
    ctx = config.ctx or min(trained, DEFAULT_CTX)
    model = build_model(checkpoint, ctx)
    return Opened(
        checkpoint=checkpoint,
        model=model,
        tokenizer=open_tokenizer(checkpoint),
        ctx=ctx,
        threads=config.threads or default_threads(),
    )


def default_threads() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def make_backend(opened: Opened, config: LoadConfig) -> tuple[GgmlBackend, int]:
    """The backend and the bytes of workspace that its largest graphs need."""
    backend = GgmlBackend(opened.model, opened.ctx, threads=opened.threads, kv_type=config.kv_type)
    segments = [step.segment for step in make_steps(opened.model, frozenset(b.key for b in model_blocks(opened.model)))]
    return backend, backend.reserve(segments)


def plan_for(opened: Opened, config: LoadConfig, workspace_bytes: int) -> Plan:
    """The plan under the configured budget.

    Raises:
        BudgetError: the budget is below what the model needs.
    """
    rates = machine_rates(opened)
    # rounded up, so that the minimum that an error names still holds when the process is a little larger next time
    base = align_up(psutil.Process().memory_info().rss + 4 * MIB, 16 * MIB)

    def demand(budget: int | None) -> Demand:
        kv_bytes = GgmlBackend.kv_nbytes(opened.model, opened.ctx, config.kv_type)
        return make_demand(
            opened.model, ctx=opened.ctx, kv_bytes=kv_bytes, workspace_bytes=workspace_bytes,
            base_bytes=base, rates=rates, budget_bytes=budget,
        )  # fmt: skip

    if config.ram == "minimum":
        least = demand(None)
        return make_plan(least, minimum_budget(least))
    budget = config.ram if config.ram is not None else default_budget(base)
    least = demand(None)
    if budget < minimum_budget(demand(budget)):
        return make_plan(least, budget)
    return make_plan(demand(budget), budget)


def default_budget(base_bytes: int) -> int:
    """What this process uses and what the machine has free, less a tenth and at least a quarter of a GiB for others."""
    free = available_memory()
    return base_bytes + free - max(free // 10, GIB // 4)


def machine_rates(opened: Opened) -> Rates:
    """Measured speeds: those that `doctor` cached, else a quick probe of this model's disk and element types."""
    profile = load_machine()
    elements = {info.element.name for info in opened.model.matrices.values()}
    known = dict(profile.kernel_bps) if profile is not None else {}
    for name in sorted(elements - known.keys()):
        known[name] = measure_kernel(element_type(name), opened.threads)
    disk = profile.disk_bps if profile is not None else measure_disk(largest_file(opened.checkpoint), seconds=0.5)
    return Rates(disk_bps=disk, kernel_bps=known)


def largest_file(checkpoint: Checkpoint) -> Path:
    """The file to measure the disk with."""
    return max(checkpoint.files, key=lambda path: path.stat().st_size)


class Runner:
    """A loaded model: weights in place, passes ready to run. Called from the driver thread; `close` frees everything."""

    def __init__(self, opened: Opened, config: LoadConfig, *, storage: Storage, progress: Progress | None) -> None:
        self.opened = opened
        self.telemetry = Telemetry(timeline=config.trace)
        self._stack = ExitStack()
        with self._stack:  # whatever fails below frees what was made before it
            self._load(config, storage, progress)
            self._stack = self._stack.pop_all()

    def _load(self, config: LoadConfig, storage: Storage, progress: Progress | None) -> None:
        model, push = self.opened.model, self._stack.callback
        self.backend, workspace = make_backend(self.opened, config)
        push(self.backend.close)
        self.plan = plan_for(self.opened, config, workspace)
        self.reader = NvmeReader(storage, self.opened.checkpoint.files, config.workers, on_read=self._on_read())
        push(self.reader.close)
        self._place_cache()
        self._place_vectors()
        self._place_matrices(progress)
        self._open_table(storage)
        self.scheduler = Scheduler(model, self.backend, self.residency, self.plan.streamed, self.telemetry)
        self.backend.reserve(self.scheduler.segments)

    def close(self) -> None:
        """Frees memory, threads and files, in the reverse order of their making. Idempotent."""
        self._stack.close()
        if self.opened.tokenizer is not None:
            self.opened.tokenizer.close()

    def _slab(self, nbytes: int) -> Slab:
        slab = Slab(nbytes)
        self._stack.callback(slab.close)
        return slab

    def _place_cache(self) -> None:
        self.backend.place_cache(self._slab(self.plan.kv_bytes).address)

    def _place_vectors(self) -> None:
        for name, vector in self.opened.model.vectors.items():
            self.backend.place_vector(name, self._vector(vector))

    def _vector(self, vector: Vector) -> Floats:
        if vector.tensor is None:
            return np.array(vector.values, dtype=np.float32)
        extent = vector.tensor.extent
        scratch = Slab(align_up(extent.window_nbytes), huge_pages=False, prefault=False)
        try:
            self.reader.read_extent(extent, scratch.view(0, extent.window_nbytes)).wait()
            raw = np.frombuffer(bytes(scratch.view(extent.lead, extent.nbytes)), dtype=np.uint8)
        finally:
            scratch.close()
        values = dequantize(raw, vector.tensor.element, vector.tensor.num_elements)
        values += np.float32(vector.offset)
        return values

    def _place_matrices(self, progress: Progress | None) -> None:
        blocks, streamed = model_blocks(self.opened.model), self.plan.streamed
        stream = None
        if streamed:
            ring = self._slab(self.plan.ring_bytes)
            stream = BlockStream([block for block in blocks if block.key in streamed], ring, self.reader)
        self.residency = Residency(self.backend.place, stream, self.telemetry)
        pinned = [block for block in blocks if block.key not in streamed]
        if pinned:
            slab = self._slab(self.plan.pinned_bytes)
            report = None if progress is None else lambda done, total: progress("load", done, total)
            self.residency.pin(pinned, slab, self.reader, report)

    def _open_table(self, storage: Storage) -> None:
        model = self.opened.model
        self._table_reader = NvmeReader(storage, [model.embedding.extent.path], 2)
        self._stack.callback(self._table_reader.close)
        self.table = EmbeddingTable(
            model.embedding, model.config.embedding_scale, self._table_reader, min(512, self.opened.ctx)
        )
        self._stack.callback(self.table.close)
        if self.plan.embedding_bytes:
            extent = model.embedding.extent
            slab = self._slab(self.plan.embedding_bytes)
            self.reader.read_extent(extent, slab.view(0, extent.window_nbytes)).wait()
            self.table.place(slab.view(extent.lead, extent.nbytes))

    def _on_read(self) -> OnRead | None:
        if self.telemetry.timeline is None:
            return None

        def on_read(start_s: float, end_s: float, nbytes: int, path: Path, offset: int) -> None:
            self.telemetry.span("read", f"{path.name} @ {offset}", start_s, end_s, nbytes)

        return on_read


def load_runner(
    path: str | Path, config: LoadConfig, *, storage: Storage | None = None, progress: Progress | None = None
) -> Runner:
    """Opens, plans and loads.

    Raises:
        CheckpointError, UnsupportedError, BudgetError, StorageError, AllocationError, BackendError: see errors.
    """
    if config.device not in ("auto", "cpu"):
        raise UsageError(f"device {config.device!r}: choose auto or cpu")
    return Runner(open_model(path, config), config, storage=storage or LocalStorage(), progress=progress)


def plan_only(path: str | Path, config: LoadConfig) -> Plan:
    """The plan that `load_runner` would follow, without reading weights."""
    opened = open_model(path, config)
    try:
        backend, workspace = make_backend(opened, config)
        try:
            return plan_for(opened, config, workspace)
        finally:
            backend.close()
    finally:
        if opened.tokenizer is not None:
            opened.tokenizer.close()


__all__ = ["Opened", "Runner", "compute_seconds", "load_runner", "plan_only"]
