"""A model in host RAM: blocks pinned or through a ring, experts in slots; and computed there, by ggml."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from platformdirs import user_cache_path

from offload.blocks import BlockSpec, ExpertKey
from offload.cache_plan import CacheShare, CacheSizes, least_cache, share_cache
from offload.config import EXPERT_READ_WORKERS, GUESSED_EXPERTS, KV_BUCKET, RESERVED_SLOTS, LoadConfig
from offload.demand import model_blocks
from offload.expert_bank import BankSpec, expert_banks
from offload.expert_cache import ExpertCache
from offload.expert_slots import ExpertBank
from offload.kernels.batch import Backend, Floats, Foresight
from offload.kernels.ggml.backend import GgmlBackend
from offload.kernels.ggml.cache import bucket_nbytes, buckets_of, table_keys
from offload.kv_stream import TableLayout, TableStream
from offload.lending import CacheMemory, IdleMemory, Range
from offload.models.base import Model
from offload.opening import Footprint, Opened
from offload.packing import Pack
from offload.places import Report
from offload.plan import Plan
from offload.prefetch.governor import WAYS, Governor, pays_at_first
from offload.prefetch.policies import make_eviction
from offload.residency import Residency
from offload.results import EdgeUse
from offload.stream import BlockStream
from offload.telemetry import Telemetry
from offload.tiers.heap import can_trim_heap
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import CAN_DISCARD, Slab
from offload.tiers.spill import SpillFile, SpillStorage
from offload.units import align_up


@dataclass(slots=True)
class HostMemory:
    """Blocks in host RAM: those that stay in one slab, the others through a ring; and experts in slots.

    Attributes:
        pin: registers a slab with a device, and returns what undoes that.
        settle: waits until no device reads slots of experts any more.
    """

    stack: ExitStack
    foresight: Foresight = field(default_factory=Foresight)
    banks: list[ExpertBank] = field(default_factory=list)
    pack: Pack | None = None
    pin: Callable[[Slab], Callable[[], None] | None] | None = None
    settle: Callable[[], None] | None = None

    def slab(self, nbytes: int, *, huge_pages: bool = True, prefault: bool = True) -> Slab:
        slab = Slab(nbytes, huge_pages=huge_pages, prefault=prefault)
        self.stack.callback(slab.close)
        undo = None if self.pin is None else self.pin(slab)
        if undo is not None:
            self.stack.callback(undo)
        return slab

    def stream(self, blocks: list[BlockSpec], nbytes: int, reader: NvmeReader) -> BlockStream | None:
        if not blocks:
            return None
        stream = BlockStream(blocks, self.slab(nbytes), reader)
        self.stack.callback(stream.close)
        return stream

    def experts(
        self, model: Model, plan: Plan, config: LoadConfig, backend: Backend, reader: NvmeReader, telemetry: Telemetry,
        report: Report | None, *, in_pass: bool, hold: Callable[[ExpertBank, int], bool] | None = None,
        beside: Governor | None = None,
    ) -> ExpertCache | None:  # fmt: skip
        """Places the banks of experts and fills them.

        Args:
            in_pass: whether the backend computes experts with the rest of a pass where all are resident; there is then
                nothing to bring, and None comes back.
            beside: what else is tried while tokens are made.
            hold: has a device hold experts of each bank for good, given the bank and its number, before it is filled; tells
                whether passes compute all of them there.
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
            bank = ExpertBank(spec, slab, num_slots, reader, policy, reserve, self.pack, self.settle)
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
            first += filling_order(spec, in_order=is_resident)
        in_passes = [
            in_pass and bank.num_slots == bank.spec.num_experts if hold is None else hold(bank, number)
            for number, bank in enumerate(self.banks)
        ]
        banks = {layer: banks[layer] for layer in sorted(banks)}
        largest = max((bank.expert_bytes for bank in plan.demand.banks), default=0)
        prior = pays_at_first(largest, plan.demand.disk_bps)
        governor = Governor(WAYS[config.prefetch], prior=prior, beside=beside)
        cache = ExpertCache(
            banks, backend, reader, telemetry, governor, config.skip_experts_below, config.coarse_experts_below
        )
        cache.fill(first, report)
        if any(bank.reserve for bank in banks.values()):
            self.foresight = Foresight(lookahead=1, width=GUESSED_EXPERTS)
            backend.set_foresight(self.foresight)
        return None if all(in_passes) else cache


def routers_stay(model: Model, plan: Plan) -> bool:
    """Whether the router of every layer is always there, so that it can be asked at any time."""
    routers = {name for router in model.routers.values() for name in router.matrices}
    return routers.isdisjoint(key.name for key in plan.streamed)


def _reserve(spec: BankSpec, num_slots: int) -> int:
    """Slots that experts may be read ahead into: so few that a choice always finds room, beside all that is guessed."""
    guessed = min(GUESSED_EXPERTS, spec.experts_per_layer)
    return max(0, min(RESERVED_SLOTS, num_slots // 4, num_slots - 2 * spec.least_slots - guessed))


def filling_order(spec: BankSpec, *, in_order: bool) -> list[ExpertKey]:
    """What a bank is filled with at first: layer by layer where all fit, else the same share of every layer."""
    keys = [ExpertKey(layer.layer, expert) for layer in spec.layers for expert in range(len(layer.experts))]
    return keys if in_order else sorted(keys, key=lambda key: (key.expert, key.layer))


class HostPlace:
    """ggml on the CPU: computes where the tiers put the bytes."""

    def __init__(self, opened: Opened, config: LoadConfig, stack: ExitStack) -> None:
        self._opened = opened
        self._config = config
        self._host = HostMemory(stack, pack=opened.pack)
        self.backend = GgmlBackend(opened.model, opened.ctx, threads=opened.threads, kv_types=config.kv_types)
        stack.callback(self.backend.close)
        bucket = bucket_nbytes(opened.model, config.kv_types)
        self._sizes = CacheSizes(
            layers=opened.model.config.num_layers, heads=opened.model.config.num_kv_heads,
            table_bytes=buckets_of(opened.ctx) * bucket, bucket_bytes=bucket,
        )  # fmt: skip
        self._use(share_cache(self._sizes, config.kv_ram))
        self._cache: Slab | None = None
        self.spill_file: SpillFile | None = None
        self.spill_reader: NvmeReader | None = None
        self.experts: ExpertCache | None = None
        self.sharing: None = None

    def footprint(self) -> Footprint:
        model = self._opened.model
        self.backend.schedule(frozenset(block.key for block in model_blocks(model, in_parts=True)))
        needs = self.backend.reserve()
        share = self._share
        return Footprint(
            in_parts=True,
            kv_bytes=share.nbytes,
            kv_streamed_bytes=share.streamed_bytes,
            workspace_bytes=needs.few,
            prompt_bytes=needs.prompt,
            micro_batch_bytes=needs.micro_batch,
            lends=CAN_DISCARD and can_trim_heap() and not share.streamed,
        )

    def spill(self, nbytes: int = 0) -> bool:
        """See `Place.spill`."""
        nbytes = max(nbytes, least_cache(self._sizes))
        if nbytes >= self._sizes.nbytes:
            return False
        self._use(share_cache(self._sizes, nbytes))
        return True

    def _use(self, share: CacheShare) -> None:
        self._share = share
        self.backend.stream_tables(share.streamed)

    def fill(self, plan: Plan, reader: NvmeReader, telemetry: Telemetry, report: Report | None) -> Residency:
        # a huge page would bring more of the cache into use than a bucket
        lends = plan.lends
        resident = (self._sizes.layers - len(self._share.streamed)) * self._sizes.layer_bytes
        if resident:
            cache = self._host.slab(resident, huge_pages=not lends, prefault=not lends)
            self.backend.place_cache(cache.address)
            self._cache = cache if lends else None
        tables = self._stream_tables() if self._share.streamed else None
        blocks = model_blocks(self._opened.model, in_parts=True)
        streamed = [block for block in blocks if block.key in plan.streamed]
        stream = self._host.stream(streamed, plan.ring_bytes, reader)
        residency = Residency(self.backend.place, stream, telemetry, tables)
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

    def _stream_tables(self) -> TableStream:
        """Tables that pass through a ring, from a file that goes with the engine."""
        sizes, streamed = self._sizes, sorted(self._share.streamed)
        keys = [key for layer in streamed for key in table_keys(layer, sizes.heads)]
        layout = TableLayout(len(keys), sizes.table_bytes // sizes.bucket_bytes, KV_BUCKET, sizes.bucket_bytes)
        tails, ring = self._host.slab(layout.tails_nbytes), self._host.slab(self._share.ring_bytes)
        self.spill_file = SpillFile(self._config.kv_dir or user_cache_path("offload"), len(keys) * sizes.table_bytes)
        self._host.stack.callback(self.spill_file.close)
        self.spill_reader = NvmeReader(SpillStorage(self.spill_file), [self.spill_file.path], EXPERT_READ_WORKERS)
        self._host.stack.callback(self.spill_reader.close)
        return TableStream(keys, layout, tails, ring, self.spill_file, self.spill_reader)

    @property
    def kv_traffic(self) -> Mapping[str, EdgeUse]:
        """See `Place.kv_traffic`."""
        if self.spill_reader is None or self.spill_file is None:
            return {}
        return {"kv: nvme->ram": self.spill_reader.statistics(), "kv: ram->nvme": self.spill_file.statistics()}

    @property
    def idle(self) -> IdleMemory | None:
        """The unused part of the cache, and what prompts leave behind."""
        if self._cache is None:
            return None
        return IdleMemory(CacheMemory(self._cache, self._cache_ranges, KV_BUCKET), self.backend.release_prompt)

    def _cache_ranges(self, first: int, last: int) -> list[Range]:
        """Where the cache keeps buckets `[first, last)`: a run of rows in each of its tables."""
        nbytes = bucket_nbytes(self._opened.model, self._config.kv_types)
        table = buckets_of(self._opened.ctx) * nbytes
        starts = range(0, self._sizes.nbytes, table)
        return [Range(start + first * nbytes, (last - first) * nbytes) for start in starts]

    @property
    def banks(self) -> Sequence[ExpertBank]:
        return self._host.banks

    @property
    def foresight(self) -> Foresight:
        return self._host.foresight

    def place_vector(self, name: str, values: Floats) -> None:
        self.backend.place_vector(name, values)
