"""A model on a torch device: matrices in its arena or through a ring there, from RAM or disk; experts held, copied, or left
to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from offload.bank_plan import DEVICE_ALIGNMENT
from offload.blocks import BlockKey, BlockSpec
from offload.config import LoadConfig
from offload.demand import model_blocks
from offload.device_stream import DeviceStream
from offload.expert_bank import BankSpec
from offload.expert_cache import ExpertCache
from offload.expert_slots import ExpertBank
from offload.host_place import HostMemory, filling_order
from offload.kernels.batch import Backend, ExpertPlace, Floats, Foresight
from offload.kernels.ggml.host_experts import HostExperts
from offload.opening import Footprint, Opened, micro_batch_tokens
from offload.places import Report
from offload.plan import Plan
from offload.processors import Processors
from offload.residency import Residency
from offload.telemetry import Telemetry
from offload.tiers.nvme import NvmeReader
from offload.tiers.ram import Slab
from offload.tuning import popularity
from offload.units import align_up

if TYPE_CHECKING:  # torch costs 200 MB of memory: it is imported when a torch device is asked for, and only then
    from offload.kernels.torch.backend import TorchBackend
    from offload.tiers.vram import DeviceTier


class DevicePlace:
    """torch on a device: pinned matrices in its arena, the others through a ring there, from RAM or from disk."""

    def __init__(self, opened: Opened, config: LoadConfig, stack: ExitStack) -> None:
        self._opened = opened
        self._config = config
        self._host = HostMemory(stack, pack=opened.pack, pin=self._register)
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
            self._opened.model, self._opened.ctx, self._config.kv_type, micro_batch_tokens(self._opened),
            self._opened.device,
        )  # fmt: skip
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
        self._tier = DeviceTier(
            opened.device, plan.device_pinned_bytes + plan.device_ring_bytes + plan.device_bank_bytes
        )
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
            opened.model, plan, self._config, self._backend, reader, telemetry, report, in_pass=False,
            hold=lambda bank, number: self._hold(bank, plan.device_slots[number]),
        )  # fmt: skip
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

    def _register(self, slab: Slab) -> Callable[[], None] | None:
        from offload.tiers.pinned import pin

        assert self._tier is not None
        return pin(slab, self._tier.device)

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

    def _hold(self, bank: ExpertBank, count: int) -> None:
        """Reads experts through the bank's own slots, and copies them to where they stay: the most popular ones."""
        if not count:
            return
        assert self._tier is not None and self._backend is not None
        offsets, stride = _device_slot(bank.spec)
        base = self._tier.allocate(count * stride)
        for layer in bank.spec.layers:
            place = ExpertPlace(base, stride, count, offsets, is_resident=False)
            self._backend.place_held(layer.layer, place)
        chosen = popularity(self._opened.checkpoint.fingerprint)
        keys = sorted(filling_order(bank.spec, in_order=False), key=lambda key: -chosen.get(key, 0))
        for number, key in enumerate(keys[:count]):
            (flight,) = bank.start([key], key.layer, ())
            flight.handle.wait()
            bank.land(flight, passing=False)
            for matrix, offset in zip(bank.matrices(key), offsets, strict=True):
                self._tier.copy_in(matrix, base + number * stride + offset).wait()
            bank.forget(key)
            bank.hold(key, number)

    def _pin(self, blocks: list[BlockSpec], plan: Plan, reader: NvmeReader) -> dict[BlockKey, memoryview]:
        if not blocks:
            return {}
        slab = self._host.slab(plan.pinned_bytes)
        table = Residency(lambda _key, _address: None, None, Telemetry())
        table.pin(blocks, slab, reader)
        return {block.key: slab.view(table.pinned[block.key] - slab.address, block.nbytes) for block in blocks}


def _device_slot(spec: BankSpec) -> tuple[tuple[int, int, int], int]:
    """Where the matrices of an expert lie in its place on a device, and the bytes of that."""
    gate, up, down = (align_up(matrix.nbytes, DEVICE_ALIGNMENT) for matrix in spec.layers[0].experts[0])
    return (0, gate, gate + up), gate + up + down


def has_second_processor(device: str) -> bool:
    """Whether the host computes beside the device. Where it is the device, there is nothing to share."""
    return device != "cpu"
