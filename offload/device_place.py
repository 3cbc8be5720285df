"""A model on a torch device: matrices in its arena or through a ring there, from RAM or disk; experts held, copied, or left
to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from offload.arena import Placed, fill_arena
from offload.blocks import BlockKey, BlockSpec, ExpertKey
from offload.config import LoadConfig
from offload.demand import host_knows_experts, model_blocks, shareable
from offload.device_stream import DeviceStream
from offload.expert_bank import device_slot
from offload.expert_cache import ExpertCache
from offload.expert_slots import HELD, ExpertBank
from offload.host_place import HostMemory, filling_order
from offload.kernels.batch import Backend, ExpertPlace, Floats, Foresight
from offload.kernels.ggml.host_experts import HostExperts
from offload.kernels.ggml.host_products import HostProducts
from offload.opening import Footprint, Opened, micro_batch_tokens
from offload.places import Report
from offload.plan import Plan
from offload.planning import minimum_device_budget
from offload.prefetch.governor import WAYS, Governor
from offload.processors import Processors, rows_on_device
from offload.residency import Residency
from offload.results import EdgeUse
from offload.sharing import Sharing
from offload.telemetry import Telemetry
from offload.tiers.direct import DirectReader, Kvikio, load_kvikio
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import Slab
from offload.tuning import popularity

if TYPE_CHECKING:  # torch costs 200 MB of memory: it is imported when a torch device is asked for, and only then
    from offload.kernels.torch.backend import TorchBackend
    from offload.tiers.vram import DeviceTier


class DevicePlace:
    """torch on a device: pinned matrices in its arena, the others through a ring there, from RAM or from disk."""

    def __init__(self, opened: Opened, config: LoadConfig, stack: ExitStack) -> None:
        self._opened = opened
        self._config = config
        self._host = HostMemory(stack, pack=opened.pack, pin=self._register, settle=self._settle)
        self._stack = stack
        self._tier: DeviceTier | None = None
        self._backend: TorchBackend | None = None
        self._vectors: dict[str, Floats] = {}
        self._experts_here: HostExperts | None = None
        self.sharing: Sharing | None = None
        self._kvikio: Kvikio | None = None
        self.experts: ExpertCache | None = None

    @property
    def backend(self) -> Backend:
        assert self._backend is not None, "the backend exists after `fill`"
        return self._backend

    def footprint(self) -> Footprint:
        from offload.kernels.torch.attention import host_attention_nbytes
        from offload.kernels.torch.backend import TorchBackend, check_device, free_device_bytes

        assert self._opened.device is not None
        check_device(self._opened.device)
        self._kvikio = load_kvikio(self._opened.device)
        shares = self._config.host_compute != "off" and has_second_processor(self._opened.device)
        if shares and host_knows_experts(self._opened.model):
            self._experts_here = HostExperts(self._opened.model, self._opened.threads)
            self._stack.callback(self._experts_here.close)
        fixed = TorchBackend.device_nbytes(
            self._opened.model, self._opened.ctx, self._config.kv_types, micro_batch_tokens(self._opened),
            self._opened.device,
        )  # fmt: skip
        budget = self._config.vram if self._config.vram is not None else free_device_bytes(self._opened.device)
        workspace = 0 if self._experts_here is None else self._experts_here.nbytes
        if shares:
            workspace += HostProducts.nbytes(self._opened.model)
        tokens = micro_batch_tokens(self._opened)
        attention = host_attention_nbytes(self._opened.model, self._opened.ctx, tokens, self._opened.threads)
        return Footprint(
            in_parts=False, kv_bytes=0, workspace_bytes=workspace, device_fixed=fixed, device_budget_bytes=budget,
            shares=shares, host_attention_bytes=None if self._config.host_compute == "off" else attention,
        )  # fmt: skip

    def spill(self, nbytes: int = 0) -> bool:
        """See `Place.spill`: the cache is on the device."""
        del nbytes
        return False

    @property
    def kv_traffic(self) -> Mapping[str, EdgeUse]:
        """See `Place.kv_traffic`."""
        return {}

    def fill(self, plan: Plan, reader: NvmeReader, telemetry: Telemetry, report: Report | None) -> Residency:
        from offload.kernels.torch.backend import TorchBackend
        from offload.kernels.torch.experts import Helper
        from offload.tiers.vram import DeviceTier

        opened, demand = self._opened, plan.demand
        assert opened.device is not None
        self._tier = DeviceTier(
            opened.device, plan.device_pinned_bytes + plan.device_ring_bytes + plan.device_bank_bytes
        )
        self._stack.callback(self._tier.close)
        self._backend = TorchBackend(
            opened.model, opened.ctx, self._tier, threads=opened.threads, kv_types=self._config.kv_types,
            host_kv=plan.host_kv, helper=None if self._experts_here is None else Helper(
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
        shared = self._share_rows(plan, pinned)
        if shared or self._experts_here is not None:
            self.sharing = Sharing(Governor(WAYS[self._config.host_compute]), stream, shared)
            self._backend.set_sharing(self.sharing)
        if report is not None:
            report(plan.device_pinned_bytes, plan.device_pinned_bytes)
        self._make_room_for_visitors(plan.device_visiting)
        self.experts = self._host.experts(
            opened.model, plan, self._config, self._backend, reader, telemetry, report, in_pass=False,
            hold=lambda bank, number: self._hold(bank, plan.device_slots[number]),
            beside=None if self.sharing is None else self.sharing.governor,
        )  # fmt: skip
        self._stack.callback(self._tier.drain)  # before the memory goes that copies read
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

    def _share_rows(self, plan: Plan, pinned: Mapping[BlockKey, memoryview]) -> dict[BlockKey, int]:
        """Gives the host its rows of matrices in its memory; returns how many bytes of each the device computes."""
        assert self._backend is not None
        model, names = self._opened.model, shareable(self._opened.model)
        nbytes: dict[BlockKey, int] = {}
        for key, memory in pinned.items():
            matrix = model.matrices[key.name]
            first = rows_on_device(matrix.shape[0], plan.host_share)
            if key.name in names and first < matrix.shape[0]:
                nbytes[key] = first * matrix.row_nbytes
                address = np.frombuffer(memory, np.uint8).ctypes.data
                self._backend.place_host_rows(key.name, first, address + nbytes[key])
        return nbytes

    def _register(self, slab: Slab) -> Callable[[], None] | None:
        from offload.tiers.pinned import pin

        assert self._tier is not None
        return pin(slab, self._tier.device)

    def _settle(self) -> None:
        assert self._backend is not None
        self._backend.experts.finish_copies()

    def _fill_arena(self, blocks: list[BlockSpec], reader: NvmeReader) -> None:
        assert self._tier is not None
        assert self._backend is not None
        placed = [Placed(block, self._tier.allocate(block.nbytes)) for block in blocks]
        as_they_are = all(reader.file(one.extent.path).descriptor is not None for one in placed)
        direct = DirectReader(self._kvikio, reader) if self._kvikio is not None and as_they_are else None
        fill_arena(placed, self._tier, reader, direct, self._register)
        for block, offset in placed:
            self._backend.place(block.key, offset)

    def _make_room_for_visitors(self, count: int) -> None:
        assert self._tier is not None and self._backend is not None
        stride = max((device_slot(layer)[1] for layer in self._opened.model.experts.values()), default=0)
        base = self._tier.allocate(count * stride)
        self._backend.experts.place_visiting([base + number * stride for number in range(count)])

    def _hold(self, bank: ExpertBank, count: int) -> bool:
        """Reads experts through the bank's own slots, and copies them to where they stay: the most popular ones.

        Tells whether passes compute the whole bank there, as they do layers of which the device holds all experts.
        """
        if not count:
            return False
        assert self._tier is not None and self._backend is not None
        offsets, stride = device_slot(bank.spec.layers[0])
        base = self._tier.allocate(count * stride)
        for layer in bank.spec.layers:
            place = ExpertPlace(base, stride, count, offsets, is_resident=False)
            self._backend.experts.place_held(layer.layer, place)
        chosen = popularity(self._opened.checkpoint.fingerprint)
        keys = sorted(filling_order(bank.spec, in_order=False), key=lambda key: -chosen.get(key, 0))
        for number, key in enumerate(keys[:count]):
            (flight,) = bank.start([key], key.layer, ())
            flight.handle.wait()
            bank.land(flight, passing=False)
            starts = [base + number * stride + offset for offset in offsets]
            self._tier.copy_parts(list(zip(bank.matrices(key), starts, strict=True))).wait()
            bank.forget(key)
            bank.hold(key, number)
        return self._complete(bank)

    def _complete(self, bank: ExpertBank) -> bool:
        """Has passes compute the layers of which all experts are held; tells whether those are all."""
        assert self._backend is not None
        if self._config.skip_experts_below:  # what is skipped is decided between a choice and its experts
            return False
        complete = True
        for layer in bank.spec.layers:
            slots = [bank.slot(ExpertKey(layer.layer, expert)) for expert in range(len(layer.experts))]
            held = [slot for slot in slots if slot is not None and slot >= HELD]
            if len(held) == len(slots):
                self._backend.experts.hold_layer(layer.layer, held)
            complete &= len(held) == len(slots)
        return complete

    def _pin(self, blocks: list[BlockSpec], plan: Plan, reader: NvmeReader) -> dict[BlockKey, memoryview]:
        if not blocks:
            return {}
        slab = self._host.slab(plan.pinned_bytes)
        table = Residency(lambda _key, _address: None, None, Telemetry())
        table.pin(blocks, slab, reader)
        return {block.key: slab.view(table.pinned[block.key] - slab.address, block.nbytes) for block in blocks}


def less_memory(device: str, plan: Plan) -> int:
    """What to use of a device after the plan's bytes were too many and were given back: three quarters, or less where less
    is free, but what the model needs. Somebody else has just taken some, and may take more."""
    from offload.kernels.torch.backend import free_device_bytes

    assert plan.device_budget_bytes is not None
    wanted = min(plan.device_budget_bytes * 3 // 4, free_device_bytes(device))
    return min(plan.device_budget_bytes, max(minimum_device_budget(plan.demand, plan.budget_bytes), wanted))


def has_second_processor(device: str) -> bool:
    """Whether the host computes beside the device. Where it is the device, there is nothing to share."""
    return device != "cpu"
