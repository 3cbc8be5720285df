"""The torch backend: runs stages on a torch device from the bytes that the device tier holds.

Matrices stay as stored in the arena; what multiplies by them is `Products`. Called from one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from math import prod
from time import perf_counter

import numpy as np
import torch

from offload.blocks import BlockKey
from offload.elements import KVTypes
from offload.errors import BackendError
from offload.kernels.batch import Bytes, ExpertPlace, Floats, Foresight, Ints, MicroBatch, Piece
from offload.kernels.torch.attention import device_attention_nbytes
from offload.kernels.torch.cache import DTYPES, TorchCache
from offload.kernels.torch.experts import Helper, TorchExperts
from offload.kernels.torch.graphs import Graphs, Recorder, recorder_for
from offload.kernels.torch.ops import TorchOps
from offload.kernels.torch.positions import Positions
from offload.kernels.torch.products import Products, products_for
from offload.kernels.torch.scales import scales_of
from offload.kernels.torch.shared_rows import SharedRows
from offload.kernels.torch.token import TokenOps, graph_nbytes, kv_length
from offload.models.base import Model
from offload.models.checkpoint.base import TensorInfo
from offload.sharing import Sharing
from offload.tiers.base import CancelToken
from offload.tiers.cgroup import available_memory
from offload.tiers.device_errors import allocating, device_errors
from offload.tiers.vram import DeviceTier


class TorchBackend:
    """See the module. An address is an offset into the arena of `tier`.

    Args:
        products: what multiplies; left out, what suits the device.
        helper: the host as second processor, for experts; left out, all are copied to the device.
        recorder: of what a token's pieces ask of the device; left out, what the device has, which may be nothing.
        host_kv: layers whose keys and values lie in host memory, where the CPU attends to them.
    """

    name = "torch"

    def __init__(
        self, model: Model, ctx: int, tier: DeviceTier, *, threads: int, kv_types: KVTypes,
        products: Products | None = None, helper: Helper | None = None, recorder: Recorder | None = None,
        host_kv: AbstractSet[int] = frozenset(),
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads)
        self._products = products or products_for(tier.device)
        self._model = model
        self._ctx = ctx
        self._tier = tier
        config = model.config
        self._cache = TorchCache(
            config.num_layers, ctx, config.num_kv_heads, config.cache_dims,
            [DTYPES[element] for element in kv_types[: len(config.cache_dims)]], tier.device, host_kv,
        )  # fmt: skip
        self._rows = SharedRows(model, threads)
        self._sharing: Sharing | None = None
        self._offsets: dict[str, int] = {}
        self._spans: list[range] = []
        self._streamed: frozenset[str] = frozenset()
        self._pieces: list[Piece] = []
        self._alone: list[bool] = []
        self._graphs = Graphs(recorder or recorder_for(tier.device))
        self._token: TokenOps | None = None
        self._vectors: dict[str, torch.Tensor] = {}
        self.experts = TorchExperts(model, tier, self._products, helper)
        self._choices: dict[tuple[int, int], Ints] = {}
        self._foresight = Foresight()
        self._cancel: CancelToken | None = None
        self._batches: Sequence[MicroBatch] = ()
        self._ops: list[TorchOps] = []
        self._hidden: list[torch.Tensor] = []
        self._parts: list[dict[int, torch.Tensor]] = []

    @staticmethod
    def device_nbytes(model: Model, ctx: int, kv_types: KVTypes, micro_batch: int, device: str) -> dict[str, int]:
        """Bytes on the device beside the matrices, by purpose: the KV cache, and upper bounds of the temporaries.

        "kv" is of all layers alike; "attention" is needed where any of them is on the device.
        """
        config = model.config
        row = sum(element.row_bytes(width) for element, width in zip(kv_types, config.cache_widths, strict=False))
        kv = config.num_layers * ctx * row
        decoded = 4 * max(info.num_elements for info in model.matrices.values())
        rows = min(micro_batch, ctx)
        activations = 4 * rows * (6 * config.hidden_size + 4 * config.intermediate_size)
        vectors = 4 * sum(prod(vector.shape) for vector in model.vectors.values())
        workspace = 3 * decoded + activations + TorchExperts.workspace_nbytes(model, rows)
        attention, target, graphs = device_attention_nbytes(model, ctx, rows), torch.device(device), 0
        if target.type == "cuda":
            graphs = graph_nbytes(model, 0, products_for(target))
            attention += graph_nbytes(model, ctx, products_for(target)) - graphs
        return {"kv": kv, "workspace": workspace, "attention": attention, "graphs": graphs, "vectors": vectors}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._tier.device

    def place(self, key: BlockKey, address: int) -> None:
        """A matrix now starts at this offset of the arena."""
        if key.name not in self._streamed and self._offsets.get(key.name) != address:
            self._graphs.forget()
        self._offsets[key.name] = address

    def place_experts(self, layer: int, place: ExpertPlace) -> None:
        """See `Backend.place_experts`. They are in host memory: copied to the device when used, or computed there."""
        self.experts.place(layer, place)

    def place_host_rows(self, name: str, first: int, address: int) -> None:
        """From its row `first` on, a matrix also lies in host memory, there at `address`, and may be computed there."""
        self._rows.place(name, self._model.matrices[name], first, address)

    def set_sharing(self, sharing: Sharing) -> None:
        """Who says whether the host computes beside the device."""
        self._sharing = sharing
        self.experts.set_sharing(sharing)

    def set_foresight(self, foresight: Foresight) -> None:
        """See `Backend.set_foresight`."""
        self._foresight = foresight

    def schedule(self, streamed: AbstractSet[BlockKey]) -> list[Piece]:
        """See `Backend.schedule`. A stage with streamed blocks stands alone, and one that attends in host memory, since no
        graph holds either; others merge, from a mix to a router.

        Layers whose experts are all held cut nothing.
        """
        pieces: list[Piece] = []
        self._spans, self._alone = [], []
        self._streamed = frozenset(key.name for key in streamed)
        self._graphs.forget()
        for index, stage in enumerate(self._model.stages):
            keys = [BlockKey("weight", stage.layer, name) for name in stage.matrices]
            missing = tuple(key for key in keys if key in streamed)
            cut = stage.layer if not self.experts.in_pass(stage.layer) else None
            routes, mixes = (cut if is_cut else None for is_cut in (stage.routes, stage.mixes))
            alone = bool(missing) or (stage.attends and stage.layer in self._cache.on_host)
            if pieces and not (alone or self._alone[-1] or pieces[-1].routes is not None):
                first = self._spans[-1].start
                name, pinned = f"{self._model.stages[first].name} .. {stage.name}", pieces[-1].pinned + len(keys)
                pieces[-1] = pieces[-1]._replace(name=name, pinned=pinned, routes=routes)
                self._spans[-1] = range(first, index + 1)
            else:
                pieces.append(Piece(stage.name, len(keys) - len(missing), missing, mixes, routes))
                self._spans.append(range(index, index + 1))
                self._alone.append(alone)
        self._pieces = pieces
        return pieces

    def place_vector(self, name: str, values: Floats) -> None:
        """Gives vector `name` its values, float32.

        Raises:
            AllocationError: the device has no such room.
        """
        self.experts.place_vector(name, values)
        self._graphs.forget()
        self._token = None
        with allocating(self._tier.device, 4 * values.size, name, "lower --vram"):
            self._vectors[name] = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self._tier.device)

    @device_errors
    @torch.inference_mode()
    def begin(self, batches: Sequence[MicroBatch], hidden: Floats) -> None:
        """See `Backend.begin`."""
        self._batches = batches
        self._choices = {}
        embedded = torch.from_numpy(hidden.copy())
        if len(batches) == 1 and batches[0].num_tokens == 1 and batches[0].outputs == (0,):
            return self._begin_token(batches[0].start, embedded)
        tokens = [batch.num_tokens for batch in batches]
        self._hidden = list(torch.split(embedded.to(self._tier.device), tokens))
        self._parts = [{} for _ in batches]
        self._ops = [self._ops_for(batch) for batch in batches]
        return None

    def _ops_for(self, batch: MicroBatch) -> TorchOps:
        """A single token is computed by the same kernels whatever pass it is in."""
        device = self._tier.device
        length = batch.kv_length if batch.num_tokens > 1 else kv_length(batch.start, self._ctx)
        outputs = torch.tensor(batch.outputs or (0,), dtype=torch.int64, device=device)
        at = torch.arange(batch.start, batch.kv_length, device=device)
        here = Positions(at, length, self._cache.loads, batch.start)
        on_host = Positions(at.cpu(), length, first=batch.start) if self._cache.on_host else None
        return TorchOps(self._weight, self._cache, here, outputs, self._product, on_host)

    def _begin_token(self, position: int, embedded: torch.Tensor) -> None:
        """Starts a pass over one token, whose pieces run as graphs where none of their blocks has to arrive."""
        if self._token is None:
            self._token = TokenOps(self._weight, self._cache, self._ctx, self._tier.device, self._product)
        token = self._token
        self._hidden, self._ops, self._parts = [token.begin(position, embedded)], [token], [token.logits]
        positions = token.positions
        self._graphs.run(f"positions {positions.known}", positions.length, positions.refresh)

    @device_errors
    @torch.inference_mode()
    def run(self, piece: int, batch: int) -> float:
        """See `Backend.run`. Looks at the cancel token between stages, or graphs; torch's own dispatch counts as kernels."""
        start = perf_counter()
        self._look()
        work = partial(self._advance, self._spans[piece], batch)
        token = self._token
        if token is None or self._ops[batch] is not token or self._alone[piece]:
            work()
        else:
            self._graphs.run(self._pieces[piece].name, token.positions.length, work)
        return perf_counter() - start

    def _advance(self, span: range, batch: int) -> None:
        """Takes a micro-batch through some stages, up to those that nobody wants."""
        ops, hidden, stages = self._ops[batch], self._hidden[batch], self._model.stages
        wanted = bool(self._batches[batch].outputs)
        for index in span if wanted else range(span.start, min(span.stop, self._model.first_output_stage)):
            self._look()
            stage = stages[index]
            if stage.routes:
                looks = self._foresight.looks(self._batches[batch].num_tokens)
                for ahead, router in enumerate(self._model.routers_behind(stage.layer, looks), 1):
                    router.foresee(ops, hidden, ahead)
            if stage.mixes and self.experts.in_pass(stage.layer):
                self.experts.compute_held(ops, stage.layer)
            result = stage.forward(ops, hidden)
            if stage.layer < 0:
                self._parts[batch][index] = ops.keep(("logits", index), result)
            else:
                hidden = result
        self._hidden[batch] = ops.keep("hidden", hidden)

    def _look(self) -> None:
        if self._cancel is not None:
            self._cancel.raise_if_cancelled()

    @device_errors
    def routed(self, batch: int, layer: int) -> Ints:
        """See `Backend.routed`. Fetched from the device once."""
        experts = self._ops[batch].chosen.get(layer)
        if experts is None:
            return np.empty((0, self._model.experts[layer].num_used), np.int32)
        if (batch, layer) not in self._choices:
            self._choices[batch, layer] = experts.int().cpu().numpy()
        return self._choices[batch, layer]

    @device_errors
    @torch.inference_mode()
    def skip(self, batch: int, layer: int, below: float) -> int:
        """See `Backend.skip`."""
        routed = self._ops[batch].routed.get(layer)
        if routed is None:
            return 0
        light = routed.weights < below * routed.weights.sum(-1, keepdim=True)
        routed.experts[light] = -1
        self._choices.pop((batch, layer), None)
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
        self.experts.compute(self._ops[batch], layer, self.routed(batch, layer), slots)
        return perf_counter() - start

    @device_errors
    def logits(self, batch: int) -> Floats:
        """See `Backend.logits`."""
        if not self._batches[batch].outputs:
            return np.empty((0, self._model.config.vocab_size), np.float32)
        rows: Floats = torch.cat(list(self._parts[batch].values()), dim=-1).cpu().numpy()
        return rows

    @device_errors
    def cached_rows(self, layer: int, start: int, stop: int) -> Bytes:
        """See `Backend.cached_rows`."""
        views = [view.cpu().view(torch.uint8) for view in self._cache.rows(layer, start, stop)]
        stored: Bytes = torch.cat(views, dim=-1).transpose(0, 1).contiguous().numpy()
        return stored

    @device_errors
    def restore_rows(self, layer: int, start: int, rows: Bytes) -> None:
        """See `Backend.restore_rows`."""
        views = self._cache.rows(layer, start, start + rows.shape[1])
        stored = torch.from_numpy(np.ascontiguousarray(rows)).transpose(0, 1)
        sizes = [view.shape[-1] * view.itemsize for view in views]
        for view, part in zip(views, torch.split(stored, sizes, dim=-1), strict=True):
            view.copy_(part.contiguous().view(view.dtype))

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """See `Backend.set_cancel`."""
        self._cancel = cancel
        self._rows.set_cancel(cancel)
        self.experts.set_cancel(cancel)

    def close(self) -> None:
        """See `Backend.close`."""
        self._graphs.forget()
        self._ops, self._hidden, self._parts, self._vectors, self._token = [], [], [], {}, None
        self._rows.close()
        self._cache.close()

    def _weight(self, name: str) -> torch.Tensor:
        vector = self._vectors.get(name)
        if vector is not None:
            return vector
        info = self._model.matrices[name]
        return self._products.values(self._stored(name), info.element, info.shape, scales_of(info, self._weight))

    def _stored(self, name: str) -> torch.Tensor:
        return self._tier.view(self._offsets[name], self._model.matrices[name].nbytes)

    def _product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        first = None if self._sharing is None or not self._sharing.rows else self._rows.on_device(name)
        info = self._model.matrices[name]
        if first is None:
            return self._multiplier(self._stored(name), info)(x)
        raw = self._tier.view(self._offsets[name], first * info.row_nbytes)
        return self._rows.product(x, name, self._multiplier(raw, info, first))

    def _multiplier(
        self, raw: torch.Tensor, info: TensorInfo, rows: int | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Multiplies by a matrix, or by its first rows."""
        shape = (info.shape[0] if rows is None else rows, info.shape[1])
        return lambda x: self._products.product(x, raw, info.element, shape, scales_of(info, self._weight))


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
