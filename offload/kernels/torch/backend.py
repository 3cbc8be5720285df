"""The torch backend: runs stages on a torch device from the bytes that the device tier holds.

Matrices stay as stored in the arena; what multiplies by them is `Products`. Called from one thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import prod
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from offload.blocks import BlockKey
from offload.config import KVType
from offload.errors import BackendError
from offload.expert_slots import HELD
from offload.kernels.batch import ExpertPlace, Floats, Foresight, Ints, MicroBatch, Piece
from offload.kernels.ggml.host_experts import HostExperts
from offload.kernels.torch.cache import TorchCache
from offload.kernels.torch.ops import TorchOps
from offload.kernels.torch.products import Products, products_for
from offload.models.base import Model
from offload.models.checkpoint.base import TensorInfo
from offload.processors import Processors, for_device
from offload.tiers.base import CancelToken
from offload.tiers.cgroup import available_memory
from offload.tiers.device_errors import allocating, device_errors
from offload.tiers.vram import DeviceTier


class Helper(NamedTuple):
    """The host beside the device: what computes experts there, and how fast both are."""

    experts: HostExperts
    processors: Processors


class TorchBackend:
    """See the module. An address is an offset into the arena of `tier`.

    Args:
        products: what multiplies; left out, what suits the device.
        helper: the host as second processor, for experts; left out, all are copied to the device.
    """

    name = "torch"

    def __init__(
        self, model: Model, ctx: int, tier: DeviceTier, *, threads: int, kv_type: KVType,
        products: Products | None = None, helper: Helper | None = None,
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads)
        self._helper = helper
        self._products = products or products_for(tier.device)
        self._model = model
        self._tier = tier
        config, dtype = model.config, torch.float16 if kv_type == "f16" else torch.float32
        self._cache = TorchCache(config.num_layers, ctx, config.num_kv_heads, config.cache_dims, dtype, tier.device)
        self._offsets: dict[str, int] = {}
        self._spans: list[range] = []
        self._vectors: dict[str, torch.Tensor] = {}
        self._experts: dict[int, ExpertPlace] = {}
        self._held: dict[int, ExpertPlace] = {}
        self._foresight = Foresight()
        self._cancel: CancelToken | None = None
        self._batches: Sequence[MicroBatch] = ()
        self._ops: list[TorchOps] = []
        self._hidden: list[torch.Tensor] = []
        self._parts: list[list[torch.Tensor]] = []

    @staticmethod
    def device_nbytes(model: Model, ctx: int, kv_type: KVType, micro_batch: int) -> dict[str, int]:
        """Bytes on the device beside the matrices, by purpose: the KV cache, and an upper bound of the temporaries."""
        config = model.config
        kv = config.num_layers * ctx * sum(config.cache_widths) * (2 if kv_type == "f16" else 4)
        decoded = 4 * max(info.num_elements for info in model.matrices.values())
        rows = min(micro_batch, ctx)
        activations = 4 * rows * (6 * config.hidden_size + 4 * config.intermediate_size + 3 * config.num_heads * ctx)
        vectors = 4 * sum(prod(vector.shape) for vector in model.vectors.values())
        return {"kv": kv, "workspace": 3 * decoded + activations, "vectors": vectors}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._tier.device

    def place(self, key: BlockKey, address: int) -> None:
        """A matrix now starts at this offset of the arena."""
        self._offsets[key.name] = address

    def place_experts(self, layer: int, place: ExpertPlace) -> None:
        """See `Backend.place_experts`. They are in host memory: copied to the device when used, or computed there."""
        self._experts[layer] = place
        if self._helper is not None:
            self._helper.experts.place(layer, place)

    def place_held(self, layer: int, place: ExpertPlace) -> None:
        """Says where the arena holds experts of a layer for good; `place.address` is an offset into it."""
        self._held[layer] = place

    def set_foresight(self, foresight: Foresight) -> None:
        """See `Backend.set_foresight`."""
        self._foresight = foresight

    def schedule(self, streamed: AbstractSet[BlockKey]) -> list[Piece]:
        """See `Backend.schedule`. A stage with streamed blocks stands alone, experts begin and end a piece; others merge."""
        pieces: list[Piece] = []
        self._spans = []
        for index, stage in enumerate(self._model.stages):
            keys = [BlockKey("weight", stage.layer, name) for name in stage.matrices]
            missing = tuple(key for key in keys if key in streamed)
            if stage.routes or stage.mixes:
                layer = stage.layer
                around = {"routes": layer} if stage.routes else {"mixes": layer}
                pieces.append(Piece(stage.name, len(keys) - len(missing), missing, **around))
                self._spans.append(range(index, index + 1))
            elif pieces and not missing and not pieces[-1].streamed and pieces[-1].routes is None:
                first = self._spans[-1].start
                name, pinned = f"{self._model.stages[first].name} .. {stage.name}", pieces[-1].pinned + len(keys)
                pieces[-1] = pieces[-1]._replace(name=name, pinned=pinned)
                self._spans[-1] = range(first, index + 1)
            else:
                pieces.append(Piece(stage.name, len(keys) - len(missing), missing))
                self._spans.append(range(index, index + 1))
        return pieces

    def place_vector(self, name: str, values: Floats) -> None:
        """Gives vector `name` its values, float32.

        Raises:
            AllocationError: the device has no such room.
        """
        if self._helper is not None:
            self._helper.experts.place_vector(name, values)
        with allocating(self._tier.device, 4 * values.size, name, "lower --vram"):
            self._vectors[name] = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self._tier.device)

    @device_errors
    @torch.inference_mode()
    def begin(self, batches: Sequence[MicroBatch], hidden: Floats) -> None:
        """See `Backend.begin`."""
        device = self._tier.device
        self._batches = batches
        self._hidden = list(torch.split(torch.from_numpy(hidden.copy()).to(device), [b.num_tokens for b in batches]))
        self._parts = [[] for _ in batches]
        self._ops = [
            TorchOps(
                self._weight,
                self._cache,
                torch.arange(batch.start, batch.start + batch.num_tokens, device=device),
                torch.tensor(batch.outputs or (0,), dtype=torch.int64, device=device),
                self._product,
            )
            for batch in batches
        ]

    @device_errors
    @torch.inference_mode()
    def run(self, piece: int, batch: int) -> float:
        """See `Backend.run`. Looks at the cancel token between stages; torch's own dispatch counts as kernels."""
        start = perf_counter()
        wanted = bool(self._batches[batch].outputs)
        for index in self._spans[piece]:
            if index >= self._model.first_output_stage and not wanted:
                break
            if self._cancel is not None:
                self._cancel.raise_if_cancelled()
            stage = self._model.stages[index]
            if stage.routes:
                looks = self._foresight.looks(self._batches[batch].num_tokens)
                for ahead, router in enumerate(self._model.routers_behind(stage.layer, looks), 1):
                    router.foresee(self._ops[batch], self._hidden[batch], ahead)
            result = stage.forward(self._ops[batch], self._hidden[batch])
            if stage.layer < 0:
                self._parts[batch].append(result)
            else:
                self._hidden[batch] = result
        return perf_counter() - start

    @device_errors
    def routed(self, batch: int, layer: int) -> Ints:
        """See `Backend.routed`."""
        experts = self._ops[batch].chosen.get(layer)
        if experts is None:
            return np.empty((0, self._model.experts[layer].num_used), np.int32)
        chosen: Ints = experts.int().cpu().numpy()
        return chosen

    @device_errors
    @torch.inference_mode()
    def skip(self, batch: int, layer: int, below: float) -> int:
        """See `Backend.skip`."""
        routed = self._ops[batch].routed.get(layer)
        if routed is None:
            return 0
        light = routed.weights < below * routed.weights.sum(-1, keepdim=True)
        routed.experts[light] = -1
        return int(light.sum())

    @device_errors
    def weights(self, batch: int, layer: int) -> Floats:
        """See `Backend.weights`."""
        weights: Floats = self._ops[batch].routed[layer].weights.cpu().numpy()
        return weights

    @device_errors
    def foreseen(self, batch: int, layer: int, ahead: int) -> Ints:
        """See `Backend.foreseen`."""
        ranked = self._ops[batch].foreseen.get((layer, ahead))
        if ranked is None:
            return np.empty((0, self._foresight.width), np.int32)
        named: Ints = ranked[:, : self._foresight.width].int().cpu().numpy()
        return named

    @device_errors
    @torch.inference_mode()
    def compute_experts(self, batch: int, layer: int, slots: Mapping[int, int]) -> float:
        """See `Backend.compute_experts`."""
        start = perf_counter()
        chosen = np.empty((0, 0), np.int32) if self._helper is None else self.routed(batch, layer)
        for_host = self._share(layer, chosen, slots)
        self._compute_here(batch, layer, {expert: slot for expert, slot in slots.items() if expert not in for_host})
        if for_host:  # beside what the device has been given
            self._compute_on_host(batch, layer, chosen, for_host)
        return perf_counter() - start

    def _share(self, layer: int, chosen: Ints, slots: Mapping[int, int]) -> dict[int, int]:
        """The experts that the host had better compute itself."""
        slots = {expert: slot for expert, slot in slots.items() if slot < HELD}
        if self._helper is None or not slots:
            return {}
        nbytes = sum(matrix.nbytes for matrix in self._model.experts[layer].experts[0])
        sent = np.bincount(chosen.reshape(-1).clip(0), minlength=max(slots) + 1)
        costs = [self._helper.processors.costs(nbytes, int(sent[expert])) for expert in slots]
        here = for_device(costs)
        return {expert: slot for index, (expert, slot) in enumerate(slots.items()) if index not in here}

    def _compute_on_host(self, batch: int, layer: int, chosen: Ints, slots: Mapping[int, int]) -> None:
        assert self._helper is not None
        routed = self._ops[batch].routed[layer]
        returned = self._helper.experts.compute(layer, routed.x.cpu().numpy(), chosen, slots)
        tokens, ranks = np.nonzero(np.isin(chosen, list(slots)))
        places = (torch.from_numpy(tokens).to(self._tier.device), torch.from_numpy(ranks).to(self._tier.device))
        routed.returned[places] = torch.from_numpy(returned[tokens, ranks]).to(self._tier.device)

    def _compute_here(self, batch: int, layer: int, slots: Mapping[int, int]) -> None:
        """Computes experts on the device: those that it holds, and copies of others."""
        experts = self._model.experts[layer]
        for expert, slot in slots.items():
            if self._cancel is not None:
                self._cancel.raise_if_cancelled()
            products = [
                self._multiplier(raw, info)
                for raw, info in zip(self._expert(layer, expert, slot), experts.experts[expert], strict=True)
            ]
            self._ops[batch].expert(experts, expert, products)

    @device_errors
    def logits(self, batch: int) -> Floats:
        """See `Backend.logits`."""
        if not self._batches[batch].outputs:
            return np.empty((0, self._model.config.vocab_size), np.float32)
        rows: Floats = torch.cat(self._parts[batch], dim=-1).cpu().numpy()
        return rows

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """See `Backend.set_cancel`."""
        self._cancel = cancel
        if self._helper is not None:
            self._helper.experts.set_cancel(cancel)

    def close(self) -> None:
        """See `Backend.close`."""
        self._ops, self._hidden, self._parts, self._vectors = [], [], [], {}

    def _expert(self, layer: int, expert: int, slot: int) -> list[torch.Tensor]:
        """Gate, up and down as stored, on the device."""
        place, number = (self._experts[layer], slot) if slot < HELD else (self._held[layer], slot - HELD)
        view = self._from_host if slot < HELD else self._tier.view
        start = place.address + number * place.stride
        matrices = self._model.experts[layer].experts[expert]
        return [view(start + offset, info.nbytes) for offset, info in zip(place.offsets, matrices, strict=True)]

    def _from_host(self, address: int, nbytes: int) -> torch.Tensor:
        raw = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
        return raw.to(self._tier.device)

    def _weight(self, name: str) -> torch.Tensor:
        vector = self._vectors.get(name)
        if vector is not None:
            return vector
        info = self._model.matrices[name]
        return self._products.values(self._stored(name), info.element, info.shape)

    def _stored(self, name: str) -> torch.Tensor:
        return self._tier.view(self._offsets[name], self._model.matrices[name].nbytes)

    def _product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._multiplier(self._stored(name), self._model.matrices[name])(x)

    def _multiplier(self, raw: torch.Tensor, info: TensorInfo) -> Callable[[torch.Tensor], torch.Tensor]:
        rows, columns = info.shape
        return lambda x: self._products.product(x, raw, info.element, (rows, columns))


def check_device(device: str) -> None:
    """
    Raises:
        BackendError: no such device, no driver, or one that is too old.
    """
    if device == "cpu":
        return
    if torch.version.cuda is None:
        raise BackendError(
            f"device {device}: this torch is built without CUDA; install one with it (https://pytorch.org), or use "
            "--device cpu"
        )
    if not torch.cuda.is_available():
        raise BackendError(
            f"device {device}: torch finds no CUDA device that its driver can use; check nvidia-smi and that the driver is "
            f"new enough for CUDA {torch.version.cuda}, or use --device cpu"
        )
    number = torch.device(device).index or 0
    if number >= torch.cuda.device_count():
        raise BackendError(
            f"device {device}: there are {torch.cuda.device_count()} CUDA devices; choose cuda:0 to "
            f"cuda:{torch.cuda.device_count() - 1}"
        )


def free_device_bytes(device: str) -> int:
    """What the device has free, less a tenth. `cpu` stands in for a card of half of the free host memory."""
    if device == "cpu":
        return available_memory() // 2
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) - int(free) // 10
