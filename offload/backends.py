"""Backends and where their matrices live: in host RAM for ggml, on the device for torch.

A `Placed` is the outcome: a backend whose pinned matrices are in place, and the residency that brings it the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from offload.blocks import BlockKey, BlockSpec, ExpertKey
from offload.config import GUESSED_EXPERTS, KV_BUCKET, RESERVED_SLOTS, LoadConfig
from offload.demand import model_blocks
from offload.device_stream import DeviceStream
from offload.expert_bank import BankSpec, expert_banks
from offload.expert_cache import ExpertCache
from offload.expert_slots import ExpertBank
from offload.kernels.batch import Backend, Floats, Foresight
from offload.kernels.ggml.backend import GgmlBackend
from offload.kernels.ggml.cache import bucket_nbytes, cache_nbytes
from offload.kernels.ggml.host_experts import HostExperts
from offload.lending import CacheMemory, IdleMemory, Range
from offload.models.base import Model
from offload.opening import Footprint, Opened, micro_batch_tokens
from offload.packing import Pack
from offload.plan import Plan
from offload.prefetch.governor import Governor, pays_at_first
from offload.prefetch.policies import make_eviction
from offload.processors import Processors
from offload.residency import Residency
from offload.stream import BlockStream
from offload.telemetry import Telemetry
from offload.tiers.heap import can_trim_heap
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import CAN_DISCARD, Slab
from offload.units import PAGE, align_up

if TYPE_CHECKING:  # torch costs 200 MB of memory: it is imported when a torch device is asked for, and only then
    from offload.kernels.torch.backend import TorchBackend
    from offload.tiers.vram import DeviceTier

Report = Callable[[int, int], None]


class Place(Protocol):
    """One way to hold a model. Made before the plan (`footprint`), filled after it (`fill`)."""

    def footprint(self) -> Footprint: ...

    def fill(self, plan: Plan, reader: NvmeReader, telemetry: Telemetry, report: Report | None) -> Residency:
        """Allocates and reads what is pinned; whatever it makes is freed with the stack it was given."""
        ...

    def place_vector(self, name: str, values: Floats) -> None: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def idle(self) -> IdleMemory | None:
        """What can be lent to weights, after `fill`; None where nothing can."""
        ...

    @property
    def experts(self) -> ExpertCache | None:
        """What brings experts, after `fill`; None where there are none, or all are resident."""
        ...

    @property
    def banks(self) -> Sequence[ExpertBank]:
        """What it brings them into, in the plan's order."""
        ...

    @property
    def foresight(self) -> Foresight:
        """What passes guess for it, after `fill`."""
        ...


@dataclass(slots=True)
class _Host:
    """Blocks in host RAM: pinned in one slab, the others through a ring; and experts in slots."""

    stack: ExitStack
    foresight: Foresight = field(default_factory=Foresight)
    banks: list[ExpertBank] = field(default_factory=list)
    pack: Pack | None = None

    def slab(self, nbytes: int, *, huge_pages: bool = True, prefault: bool = True) -> Slab:
        slab = Slab(nbytes, huge_pages=huge_pages, prefault=prefault)
        self.stack.callback(slab.close)
        return slab

    def stream(self, blocks: list[BlockSpec], nbytes: int, reader: NvmeReader) -> BlockStream | None:
        if not blocks:
            return None
        stream = BlockStream(blocks, self.slab(nbytes), reader)
        self.stack.callback(stream.close)
        return stream

    def experts(
        self, model: Model, plan: Plan, config: LoadConfig, backend: Backend, reader: NvmeReader, telemetry: Telemetry,
        report: Report | None, *, in_pass: bool,
    ) -> ExpertCache | None:  # fmt: skip
        """Places the banks of experts and fills them.

        Args:
            in_pass: whether the backend computes experts with the rest of a pass where all are resident; there is then
                nothing to bring, and None comes back.
        """
        guesses = config.prefetch != "off" and routers_stay(model, plan)
        banks: dict[int, ExpertBank] = {}
        first: list[ExpertKey] = []
        for spec, num_slots, most in zip(expert_banks(model), plan.bank_slots, plan.bank_slots_at(0), strict=True):
            is_resident = in_pass and num_slots == spec.num_experts
            reserve = _reserve(spec, num_slots) if guesses and not is_resident else 0
            policy = make_eviction(config.expert_policy, [layer.layer for layer in spec.layers], spec.experts_per_layer)
            slab = self.slab(most * spec.stride, prefault=most == num_slots)
            if most > num_slots:
                slab.populate(0, align_up(num_slots * spec.stride))
            bank = ExpertBank(spec, slab, num_slots, reader, policy, reserve, self.pack)
            self.banks.append(bank)
            before = 0
            for layer in spec.layers:
                place = bank.place(layer.layer)
                if is_resident:
                    place = place._replace(
                        address=place.address + before * spec.stride, num_slots=len(layer.experts), is_resident=True
                    )
                backend.place_experts(layer.layer, place)
                before += len(layer.experts)
                banks[layer.layer] = bank
            first += _filling_order(spec, in_order=is_resident)
        banks = {layer: banks[layer] for layer in sorted(banks)}
        fixed = {"auto": None, "on": True, "off": False}[config.prefetch]
        largest = max((bank.expert_bytes for bank in plan.demand.banks), default=0)
        governor = Governor(fixed, prior=pays_at_first(largest, plan.demand.disk_bps))
        cache = ExpertCache(
            banks, backend, reader, telemetry, governor, config.skip_experts_below, config.coarse_experts_below
        )
        cache.fill(first, report)
        fetched = not in_pass or any(bank.num_slots < bank.spec.num_experts for bank in banks.values())
        if any(bank.reserve for bank in banks.values()):
            self.foresight = Foresight(lookahead=1, width=GUESSED_EXPERTS)
            backend.set_foresight(self.foresight)
        return cache if fetched and banks else None


def routers_stay(model: Model, plan: Plan) -> bool:
    """Whether the router of every layer is always there, so that it can be asked at any time."""
    routers = {name for router in model.routers.values() for name in router.matrices}
    return routers.isdisjoint(key.name for key in plan.streamed)


def _reserve(spec: BankSpec, num_slots: int) -> int:
    """Slots that experts may be read ahead into: so few that a choice always finds room, beside all that is guessed."""
    guessed = min(GUESSED_EXPERTS, spec.experts_per_layer)
    return max(0, min(RESERVED_SLOTS, num_slots // 4, num_slots - 2 * spec.least_slots - guessed))


def _filling_order(spec: BankSpec, *, in_order: bool) -> list[ExpertKey]:
    """What a bank is filled with at first: layer by layer where all fit, else the same share of every layer."""
    keys = [ExpertKey(layer.layer, expert) for layer in spec.layers for expert in range(len(layer.experts))]
    return keys if in_order else sorted(keys, key=lambda key: (key.expert, key.layer))


class HostPlace:
    """ggml on the CPU: computes where the tiers put the bytes."""

    def __init__(self, opened: Opened, config: LoadConfig, stack: ExitStack) -> None:
        self._opened = opened
        self._config = config
        self._host = _Host(stack, pack=opened.pack)
        self.backend = GgmlBackend(opened.model, opened.ctx, threads=opened.threads, kv_type=config.kv_type)
        stack.callback(self.backend.close)
        self._cache: Slab | None = None
        self.experts: ExpertCache | None = None

    def footprint(self) -> Footprint:
        model, ctx = self._opened.model, self._opened.ctx
        self.backend.schedule(frozenset(block.key for block in model_blocks(model, in_parts=True)))
        needs = self.backend.reserve()
        kv = cache_nbytes(model, ctx, self._config.kv_type)
        buckets = bucket_nbytes(model, self._config.kv_type)
        whole_pages = all(nbytes % PAGE == 0 for nbytes in buckets)
        return Footprint(
            in_parts=True,
            kv_bytes=kv,
            workspace_bytes=needs.few,
            prompt_bytes=needs.prompt,
            micro_batch_bytes=needs.micro_batch,
            lends=whole_pages and CAN_DISCARD and can_trim_heap(),
        )

    def fill(self, plan: Plan, reader: NvmeReader, telemetry: Telemetry, report: Report | None) -> Residency:
        # a huge page would bring more of the cache into use than a bucket
        lends = plan.lends
        cache = self._host.slab(plan.kv_bytes, huge_pages=not lends, prefault=not lends)
        self.backend.place_cache(cache.address)
        self._cache = cache if lends else None
        blocks = model_blocks(self._opened.model, in_parts=True)
        streamed = [block for block in blocks if block.key in plan.streamed]
        residency = Residency(self.backend.place, self._host.stream(streamed, plan.ring_bytes, reader), telemetry)
        pinned = [block for block in blocks if block.key not in plan.streamed]
        if pinned:
            residency.pin(pinned, self._host.slab(plan.pinned_bytes), reader, report)
        self.experts = self._host.experts(
            self._opened.model,
            plan,
            self._config,
            self.backend,
            reader,
            telemetry,
            report,
            in_pass=not self._config.skip_experts_below,
        )
        return residency

    @property
    def idle(self) -> IdleMemory | None:
        """The unused part of the cache, and what prompts leave behind."""
        if self._cache is None:
            return None
        return IdleMemory(CacheMemory(self._cache, self._cache_ranges, KV_BUCKET), self.backend.release_prompt)

    def _cache_ranges(self, first: int, last: int) -> list[Range]:
        """Where the cache keeps buckets `[first, last)`: a run of rows in each of its tensors."""
        model = self._opened.model
        sizes = bucket_nbytes(model, self._config.kv_type)
        buckets = align_up(self._opened.ctx, KV_BUCKET) // KV_BUCKET
        ranges, start = [], 0
        for nbytes in sizes * model.config.num_layers:
            ranges.append(Range(start + first * nbytes, (last - first) * nbytes))
            start += buckets * nbytes
        return ranges

    @property
    def banks(self) -> Sequence[ExpertBank]:
        return self._host.banks

    @property
    def foresight(self) -> Foresight:
        return self._host.foresight

    def place_vector(self, name: str, values: Floats) -> None:
        self.backend.place_vector(name, values)


class DevicePlace:
    """torch on a device: pinned matrices in its arena, the others through a ring there, from RAM or from disk."""

    def __init__(self, opened: Opened, config: LoadConfig, stack: ExitStack) -> None:
        self._opened = opened
        self._config = config
        self._host = _Host(stack, pack=opened.pack)
        self._stack = stack
        self._tier: DeviceTier | None = None
        self._backend: TorchBackend | None = None
        self._vectors: dict[str, Floats] = {}
        self._experts_here: HostExperts | None = None
        self.experts: ExpertCache | None = None

    @property
    def backend(self) -> Backend:
        assert self._backend is not None, "the backend exists after `fill`"
        return self._backend

    def footprint(self) -> Footprint:
        from offload.kernels.torch.backend import TorchBackend, check_device, free_device_bytes

        assert self._opened.device is not None
        check_device(self._opened.device)
        if self._opened.model.experts and has_second_processor(self._opened.device):
            self._experts_here = HostExperts(self._opened.model, self._opened.threads)
            self._stack.callback(self._experts_here.close)
        fixed = TorchBackend.device_nbytes(
            self._opened.model, self._opened.ctx, self._config.kv_type, micro_batch_tokens(self._opened)
        )
        budget = self._config.vram if self._config.vram is not None else free_device_bytes(self._opened.device)
        workspace = 0 if self._experts_here is None else self._experts_here.nbytes
        return Footprint(
            in_parts=False, kv_bytes=0, workspace_bytes=workspace, device_fixed=fixed, device_budget_bytes=budget
        )

    def fill(self, plan: Plan, reader: NvmeReader, telemetry: Telemetry, report: Report | None) -> Residency:
        from offload.kernels.torch.backend import Helper, TorchBackend
        from offload.tiers.vram import DeviceTier

        opened, demand = self._opened, plan.demand
        assert opened.device is not None
        self._tier = DeviceTier(opened.device, plan.device_pinned_bytes + plan.device_ring_bytes)
        self._stack.callback(self._tier.close)
        self._backend = TorchBackend(
            opened.model, opened.ctx, self._tier, threads=opened.threads, kv_type=self._config.kv_type,
            helper=None if self._experts_here is None else Helper(
                self._experts_here, Processors(link_bps=demand.link_bps, host_bps=demand.expert_bps)),
        )  # fmt: skip
        self._stack.callback(self._backend.close)
        for name, values in self._vectors.items():
            self._backend.place_vector(name, values)
        tiers = {placement.key: placement.tier for placement in plan.placements}
        blocks = model_blocks(opened.model, in_parts=False)
        self._fill_arena([block for block in blocks if tiers[block.key] == "vram"], reader)
        pinned = self._pin([block for block in blocks if tiers[block.key] == "ram"], plan, reader)
        from_disk = [block for block in blocks if tiers[block.key] == "nvme"]
        lower = self._host.stream(from_disk, plan.ring_bytes, reader)
        moving = [block for block in blocks if tiers[block.key] != "vram"]
        stream = None
        if moving:
            base = self._tier.allocate(plan.device_ring_bytes)
            stream = DeviceStream(moving, self._tier, base, plan.device_ring_bytes, pinned, lower)
        if report is not None:
            report(plan.device_pinned_bytes, plan.device_pinned_bytes)
        self.experts = self._host.experts(
            opened.model, plan, self._config, self._backend, reader, telemetry, report, in_pass=False
        )
        return Residency(self._backend.place, stream, telemetry)

    @property
    def idle(self) -> None:
        """Nothing: cache and workspace are on the device."""

    @property
    def banks(self) -> Sequence[ExpertBank]:
        return self._host.banks

    @property
    def foresight(self) -> Foresight:
        return self._host.foresight

    def place_vector(self, name: str, values: Floats) -> None:
        self._vectors[name] = values

    def _fill_arena(self, blocks: list[BlockSpec], reader: NvmeReader) -> None:
        """Reads blocks into the device's arena through a staging slab of one block."""
        if not blocks:
            return
        assert self._tier is not None
        assert self._backend is not None
        staging = Slab(max(block.footprint for block in blocks), prefault=False)
        try:
            for block in blocks:
                assert block.extent is not None
                reader.read_extent(block.extent, staging.view(0, block.footprint)).wait()
                offset = self._tier.allocate(block.nbytes)
                self._tier.copy_in(staging.view(block.extent.lead, block.nbytes), offset).wait()
                self._backend.place(block.key, offset)
        finally:
            staging.close()

    def _pin(self, blocks: list[BlockSpec], plan: Plan, reader: NvmeReader) -> dict[BlockKey, memoryview]:
        if not blocks:
            return {}
        slab = self._host.slab(plan.pinned_bytes)
        table = Residency(lambda _key, _address: None, None, Telemetry())
        table.pin(blocks, slab, reader)
        return {block.key: slab.view(table.pinned[block.key] - slab.address, block.nbytes) for block in blocks}


def has_second_processor(device: str) -> bool:
    """Whether the host computes beside the device. Where it is the device, there is nothing to share."""
    return device != "cpu"


def make_place(opened: Opened, config: LoadConfig, stack: ExitStack) -> Place:
    """The place for the configured device; what it makes is freed with `stack`."""
    return HostPlace(opened, config, stack) if opened.device is None else DevicePlace(opened, config, stack)
