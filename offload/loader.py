"""A `Runner`: a model whose weights are where the plan wants them, ready for forward passes; and how it comes to be.

Open, plan, allocate, read, in that order; the reverse order on close, or when anything fails on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np

from offload.backends import make_place
from offload.borrowers import BlockBorrower, SlotBorrower
from offload.config import EXPERT_READ_WORKERS, MINIMUM, READ_WORKERS, LoadConfig
from offload.device_place import less_memory
from offload.embedding import EmbeddingTable
from offload.errors import AllocationError, BudgetError, DeviceError
from offload.kernels.batch import Backend, Floats, Foresight
from offload.kernels.ggml.dequantize import dequantize
from offload.lending import IdleMemory, Lending
from offload.models.base import Vector
from offload.models.checkpoint.base import TensorInfo
from offload.opening import Opened, Progress, known_tuning, micro_batch_tokens, open_model, plan_for
from offload.places import Place
from offload.plan import Plan
from offload.residency import Residency
from offload.results import EdgeUse
from offload.scheduler import Scheduler
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken, OnRead
from offload.tiers.cgroup import available_memory
from offload.tiers.files import LocalStorage, Storage
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import Slab
from offload.units import format_size

_LOG: Final = logging.getLogger("offload")
_REMEDY: Final = "close what else uses it, or lower --ctx, and load the model again, or use --device cpu"


class Runner:
    """See the module. Called from the driver thread."""

    def __init__(self, opened: Opened, config: LoadConfig, *, storage: Storage, progress: Progress | None) -> None:
        self.opened = opened
        self.telemetry = Telemetry(timeline=config.trace)
        self._config = config
        self._storage = storage
        self._read_before = EdgeUse(bytes=0, busy_s=0.0)
        self._stack = ExitStack()
        try:
            self._fill(config, progress)
        except BaseException:
            opened.close()
            raise

    def _fill(self, config: LoadConfig, progress: Progress | None) -> None:
        with ExitStack() as self._stack:  # whatever fails below frees what was made before it
            self._load(make_place(self.opened, config, self._stack), config, self._storage, progress)
            self._stack = self._stack.pop_all()

    def _load(self, place: Place, config: LoadConfig, storage: Storage, progress: Progress | None) -> None:
        self.plan: Plan = plan_with_cache(self.opened, config, place)
        files = [*self.opened.checkpoint.files, *([self.opened.pack.path] if self.opened.pack is not None else [])]
        self.reader = NvmeReader(storage, files, workers_for(self.opened, config), on_read=self._on_read())
        self._stack.callback(self.reader.close)
        for name, vector in self.opened.model.vectors.items():
            place.place_vector(name, self._read_vector(vector))
        report = None if progress is None else lambda done, total: progress("load", done, total)
        residency = place.fill(self.plan, self.reader, self.telemetry, report)
        # readers end before the memory that they write into goes: close them first
        self._stack.callback(self.reader.close)
        self._open_table(storage)
        self._place = place
        self.backend: Backend = place.backend
        self.scheduler = Scheduler(
            place.backend, residency, self.plan.streamed, self.telemetry, place.experts, place.sharing
        )
        self._own_foresight = place.foresight
        self._fetches_experts = place.experts is not None
        self._lending = self._lend(place, residency)
        self.lend(1)  # nothing is in use yet; a prompt takes what it needs

    @property
    def lent_bytes(self) -> int:
        """Bytes of streamed weights that idle memory holds now."""
        return 0 if self._lending is None else self._lending.nbytes

    @property
    def fetches_experts(self) -> bool:
        """Whether experts come and go."""
        return self._fetches_experts

    def make_room(self, positions: int, pass_tokens: int) -> None:
        """See `Lending.make_room`."""
        if self._lending is not None:
            self._lending.make_room(positions, pass_tokens)

    def lend(self, positions: int, cancel: CancelToken | None = None) -> bool:
        """See `Lending.lend`."""
        return self._lending is not None and self._lending.lend(positions, cancel)

    def foresee(self, foresight: Foresight | None) -> None:
        """Has passes guess what later layers will choose; None goes back to what reading ahead needs."""
        self.backend.set_foresight(self._own_foresight if foresight is None else foresight)
        self.scheduler.reschedule()

    @property
    def kv_traffic(self) -> Mapping[str, EdgeUse]:
        """See `Place.kv_traffic`."""
        return self._place.kv_traffic

    @property
    def disk_use(self) -> EdgeUse:
        """What was read from disk since the model was opened."""
        return self._read_before + self.reader.statistics()

    def shrink(self, positions: int) -> bool:
        """After its device ran out of memory: loads the model anew into less of it; the cache keeps so many positions.

        False where there is no device, or where somebody watches the passes and would see only some of them.

        Raises:
            DeviceError: it cannot be; nothing is loaded any more.
        """
        device, plan = self.opened.device, self.plan
        if device is None or self.scheduler.observer is not None:
            return False
        layers = range(self.opened.model.config.num_layers)
        rows = [self.backend.cached_rows(layer, 0, positions) for layer in layers] if positions else []
        self._read_before = self.disk_use
        self._stack.close()
        less = less_memory(device, plan)
        if less == plan.device_budget_bytes:
            raise DeviceError(f"{device}: out of memory, and the model needs {format_size(less)} of it; {_REMEDY}")
        _LOG.warning(
            "%s: out of memory; loading anew, into %s of it, to go on where it stopped", device, format_size(less)
        )
        try:
            self._fill(replace(self._config, vram=less), None)
        except (AllocationError, BudgetError) as error:
            raise DeviceError(
                f"{device}: out of memory, and it could not be loaded anew ({error}); {_REMEDY}"
            ) from error
        for layer, stored in zip(layers, rows, strict=False):
            self.backend.restore_rows(layer, 0, stored)
        return True

    def close(self) -> None:
        """Frees memory, threads and files, in the reverse order of their making. Idempotent."""
        self._stack.close()
        self.opened.close()

    def _read_vector(self, vector: Vector) -> Floats:
        if vector.stacked:
            return np.concatenate(self._read_tensors(vector.stacked))
        if vector.tensor is None:
            return np.array(vector.values, dtype=np.float32)
        (values,) = self._read_tensors((vector.tensor,))
        values += np.float32(vector.offset)
        values = values.reshape(vector.tensor.shape)[..., vector.start :: vector.step]
        return np.ascontiguousarray(values).reshape(-1)

    def _read_tensors(self, tensors: Sequence[TensorInfo]) -> list[Floats]:
        """Values of small tensors, which are read at once."""
        starts = [0, *accumulate(tensor.extent.window_nbytes for tensor in tensors)]
        scratch = Slab(starts[-1], huge_pages=False, prefault=False)
        try:
            views = [scratch.view(start, t.extent.window_nbytes) for start, t in zip(starts, tensors, strict=False)]
            (handle,) = self.reader.read_groups([[(t.extent, view) for t, view in zip(tensors, views, strict=True)]])
            handle.wait()
            stored = [bytes(view[t.extent.lead :][: t.nbytes]) for t, view in zip(tensors, views, strict=True)]
        finally:
            scratch.close()
        return [
            dequantize(np.frombuffer(raw, np.uint8), t.element, t.num_elements)
            for t, raw in zip(tensors, stored, strict=True)
        ]

    def _open_table(self, storage: Storage) -> None:
        table, scale = self.opened.model.embedding, self.opened.model.config.embedding_scale
        reader = NvmeReader(storage, [table.extent.path], 2)
        self._stack.callback(reader.close)
        self.table = EmbeddingTable(table, scale, reader, micro_batch_tokens(self.opened), self.telemetry)
        self._stack.callback(self.table.close)
        self._stack.callback(reader.close)  # again, now also before the table's memory goes
        if self.plan.embedding_bytes:
            slab = Slab(self.plan.embedding_bytes)
            self._stack.callback(slab.close)
            self.reader.read_extent(table.extent, slab.view(0, table.extent.window_nbytes)).wait()
            self.table.place(slab.view(table.extent.lead, table.nbytes))

    def _lend(self, place: Place, residency: Residency) -> Lending | None:
        idle, most = place.idle, self.plan.on_loan(0)
        if idle is None or not self.plan.lends:
            return None
        if place.experts is not None and not most:
            return Lending(self._idle(idle), SlotBorrower(self.plan, place.banks, place.experts.settle))
        slab = Slab(sum(block.footprint for block in self.plan.borrowers[:most]), prefault=False)
        self._stack.callback(slab.close)
        self._stack.callback(self.reader.close)
        borrower = BlockBorrower(self.plan, slab, residency, self.reader, self.scheduler.set_streamed)
        return Lending(self._idle(idle), borrower)

    def _idle(self, idle: IdleMemory) -> IdleMemory:
        """The same, with what the token table needs for prompts."""

        def release_prompt() -> None:
            idle.release_prompt()
            self.table.release_scratch()

        return IdleMemory(idle.cache, release_prompt)

    def _on_read(self) -> OnRead | None:
        if self.telemetry.timeline is None:
            return None

        def on_read(start_s: float, end_s: float, nbytes: int, path: Path, offset: int) -> None:
            self.telemetry.span("read", f"{path.name} @ {offset}", start_s, end_s, nbytes)

        return on_read


def workers_for(opened: Opened, config: LoadConfig) -> int:
    """Reader threads of the NVMe tier."""
    return config.workers or (EXPERT_READ_WORKERS if opened.model.experts else READ_WORKERS)


def load_runner(
    path: str | Path, config: LoadConfig, *, storage: Storage | None = None, progress: Progress | None = None
) -> Runner:
    """Opens, plans and loads.

    Raises:
        CheckpointError, UnsupportedError, BudgetError, StorageError, AllocationError, BackendError: see errors.
    """
    try:
        opened = open_model(path, config)
        return Runner(opened, tuned(opened, config), storage=storage or LocalStorage(), progress=progress)
    except MemoryError as error:  # of Python's or numpy's own heap
        free = available_memory()
        raise AllocationError(
            f"memory: refused while the model was loaded ({error or 'Python objects'}), {format_size(free)} available; "
            "close other programs or lower --ram",
            needed_bytes=0,
            available_bytes=free,
        ) from error


def tuned(opened: Opened, config: LoadConfig) -> LoadConfig:
    """The configuration with what is known to suit the model, where nothing else was asked for."""
    found = known_tuning(opened)
    if found is None:
        return config
    return replace(
        config,
        expert_policy=found.policy if config.expert_policy == "auto" else config.expert_policy,
        prefetch=found.prefetch if config.prefetch == "auto" else config.prefetch,
        workers=config.workers or found.workers,
    )


def plan_only(path: str | Path, config: LoadConfig) -> Plan:
    """The plan that `load_runner` would follow, without reading weights."""
    opened = open_model(path, config)
    with ExitStack() as stack:
        stack.callback(opened.close)
        return plan_with_cache(opened, config, make_place(opened, config, stack))


def plan_with_cache(opened: Opened, config: LoadConfig, place: Place) -> Plan:
    """The plan; where the budget does not hold the whole KV cache, with as much of it as is left behind the weights.

    What the cache does not use yet is lent to weights while it is in memory, so that is where it is if it can be.

    Raises:
        BudgetError: the budget is too small in any case.
    """
    try:
        return plan_for(opened, config, place.footprint())
    except BudgetError:
        if config.kv_ram is not None or config.ram == MINIMUM or not place.spill():
            raise
    plan = plan_for(opened, config, place.footprint())
    left = plan.budget_bytes - plan.used_bytes
    if plan.streamed_bytes or plan.missed_bytes or left <= 0 or not place.spill(plan.kv_bytes + left):
        return plan
    return plan_for(opened, config, place.footprint())
