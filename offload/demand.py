"""What a model needs of memory and time, counted from its description. Pure arithmetic over sizes and measured rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Final

from offload.bank_plan import BankDemand, Curve
from offload.blocks import BlockKey, BlockSpec
from offload.config import FEW_TOKENS, KV_BUCKET, MICRO_BATCH_TOKENS
from offload.expert_bank import expert_banks, expert_nbytes
from offload.kv_plan import KVDemand
from offload.models.base import Model
from offload.models.checkpoint.base import TensorInfo
from offload.units import MIB, align_up

DEFAULT_KERNEL_BPS: Final = 12e9
MARGIN_BYTES: Final = 24 * MIB  # Python's heap, thread stacks, page tables, library pages touched late
MAX_MICRO_BATCHES: Final = 8
QUIET_READING: Final = 8  # reading that lasts an eighth of computing no longer takes memory bandwidth that kernels miss
BATCH_SPEEDUP: Final = 16  # at most, of a prompt's token over a decoded one: matrices are loaded once for many
LOGITS_BYTES: Final = 8 * MIB
LAYER_OVERHEAD_S: Final = 60e-6  # norms, attention over a short context, graph calls
EXPERT_EFFICIENCY: Final = (
    0.6  # of a kernel's rate on large matrices, with experts of 1.6M weights a matrix, all resident
)
FETCH_LAYER_S: Final = (
    0.6e-3  # what bringing a layer's experts takes of the processor, beside reading them: Python, and graphs
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Speeds of the machine in bytes/s: the disk, the CPU's kernels by element type at batch 1, host memory to the device.

    `device_bps`: the same of a device's kernels; empty where computing happens on the CPU, or that stands in. `attention_s`
    is what one token spends on one cached position of one layer on the CPU, `device_attention_s` on the device, and
    `crossing_s` the time from there to host memory and back.
    """

    disk_bps: float
    kernel_bps: Mapping[str, float]
    device_bps: Mapping[str, float] = field(default_factory=dict)
    link_bps: float = 0.0
    attention_s: float = 0.0
    device_attention_s: float = 0.0
    crossing_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a model at a context length needs before any budget is known.

    Attributes:
        blocks: every matrix, in order of first use in a pass.
        banks: what there is of experts, which are no blocks of a cycle.
        groups: indices into `blocks` of those that have to be in memory together, in order of use.
        embedding: the token table where no head part is the same bytes, else None. Rows can be read from disk.
        fixed: bytes that are always resident, by purpose: base, margin, vectors, kv, workspace.
        compute_s: kernel time of one decoded token at the start of the context.
        attention_s: what attention adds to it at the end of a full context.
        fetch_s: what bringing experts adds to it where not all are in memory.
        ctx: context length in tokens. trained_ctx: that the model was made for.
        disk_bps: bandwidth of the disk in bytes/s. link_bps: of the way from RAM to the device.
        dense_bps, expert_bps: bytes of matrices, and of experts, that the CPU computes in a second for one token.
        shared: indices into `blocks` of those whose rows the CPU can compute beside a device.
        device_fixed: bytes that are always on the device, by purpose; None when computing happens in host RAM.
        kv: what layers need whose keys and values may lie in host memory; None where that is no choice. host_kv: those that
            do; `fixed`, `device_fixed` and `attention_s` are of this placement.
        kv_bucket_tokens: positions by which the used part of the KV cache grows. kv_bucket_bytes: memory of so many; 0 where
            the cache's unused part cannot be lent.
        prompt_bytes: of the workspace, what only prompts use and give back; 0 where it cannot be lent.
        kv_streamed_bytes: of the cache, what is read from disk for a token at the end of a full context.
    """

    blocks: tuple[BlockSpec, ...]
    banks: tuple[BankDemand, ...] = ()
    groups: tuple[tuple[int, ...], ...]
    embedding: BlockSpec | None
    fixed: Mapping[str, int]
    compute_s: float
    attention_s: float = 0.0
    fetch_s: float = 0.0
    disk_bps: float
    dense_bps: float = 0.0
    expert_bps: float = 0.0
    shared: frozenset[int] = frozenset()
    ctx: int
    trained_ctx: int
    prefill_tokens_per_pass: int
    link_bps: float = 0.0
    device_fixed: Mapping[str, int] | None = None
    kv: KVDemand | None = None
    host_kv: frozenset[int] = frozenset()
    kv_bucket_tokens: int = 1
    kv_bucket_bytes: int = 0
    prompt_bytes: int = 0
    kv_streamed_bytes: int = 0

    @property
    def crossing_s(self) -> float:
        """What attention in host memory adds to every token, wherever it is in the context."""
        return self.kv.crossing_s * len(self.host_kv) if self.kv is not None else 0.0

    def with_host_kv(self, layers: frozenset[int]) -> Demand:
        """The same with keys and values of these layers in host memory, and of no others."""
        kv, device = self.kv, self.device_fixed
        assert kv is not None and device is not None, "where there is nothing to choose"
        here = len(kv.reaches) - len(layers)
        host = {"kv": align_up(len(layers) * kv.layer_bytes), "attention": kv.host_bytes if layers else 0}
        there = {"kv": here * kv.layer_bytes, "attention": kv.device_bytes if here else 0}
        return replace(
            self, host_kv=layers, fixed={**self.fixed, **host}, device_fixed={**device, **there},
            attention_s=kv.attention_s(layers),
        )  # fmt: skip

    def kv_used(self, tokens: int) -> int:
        """Bytes of the KV cache in use when it holds `tokens` positions."""
        buckets = max(1, -(-tokens // self.kv_bucket_tokens))
        return min(self.fixed["kv"], buckets * self.kv_bucket_bytes) if self.kv_bucket_bytes else self.fixed["kv"]

    def idle(self, tokens: int, *, prompt: bool) -> int:
        """Bytes that can be lent while the cache holds `tokens` positions and no prompt, or one, is being read."""
        return self.fixed["kv"] - self.kv_used(tokens) + (0 if prompt else self.prompt_bytes)


def model_blocks(model: Model, *, in_parts: bool) -> tuple[BlockSpec, ...]:
    """Every matrix as a block, or every part of one, in order of first use."""
    return tuple(
        BlockSpec(
            key=BlockKey("weight", stage.layer, name, number),
            nbytes=part.nbytes,
            extent=part.extent,
            columns=part.shape[-1],
        )
        for stage in model.stages
        for name in stage.matrices
        for number, part in enumerate(model.parts[name] if in_parts else (model.matrices[name],))
    )


def model_banks(model: Model, curves: Sequence[Curve] = ()) -> tuple[BankDemand, ...]:
    """What the model's experts need of memory, bank by bank. `curves`: of each bank, see `BankDemand`; none if unknown."""
    banks = expert_banks(model)
    return tuple(
        BankDemand(
            slot_bytes=bank.stride,
            expert_bytes=expert_nbytes(bank.layers[0]),
            num_experts=bank.num_experts,
            least_slots=bank.least_slots,
            used=sum(layer.num_used for layer in bank.layers),
            curve=curve,
        )
        for bank, curve in zip(banks, curves if len(curves) == len(banks) else [()] * len(banks), strict=True)
    )


def is_tied(model: Model) -> bool:
    """Whether the token table is the same bytes as the output matrix."""
    heads = [model.matrices[name] for stage in model.stages[-model.head_parts :] for name in stage.matrices]
    table = model.embedding.extent
    return any(head.extent.path == table.path and head.extent.offset == table.offset for head in heads)


def micro_batches_per_pass(
    micro_batch_bytes: int, budget_bytes: int | None, reading_s: float, computing_s: float, *, lends: bool
) -> int:
    """Micro-batches that share one reading of the weights: as many as take longer to compute than the reading does.

    Where their memory holds weights while no prompt is read (`lends`), as many as compute `QUIET_READING` times as long.
    At most what 5% of the budget holds, or 10% if it is lent; at least one.
    """
    if budget_bytes is None:
        return 1
    wanted = ceil(reading_s * (QUIET_READING if lends else 1) / computing_s)
    return max(1, min(wanted, MAX_MICRO_BATCHES, budget_bytes // (10 if lends else 20) // micro_batch_bytes))


def micro_batch_nbytes(model: Model, ctx: int, tokens: int = MICRO_BATCH_TOKENS) -> int:
    """Memory that each micro-batch of a pass holds: two hidden states, embedded tokens, masks."""
    tokens = min(tokens, ctx)
    windows = len(set(model.config.sliding_windows))
    return tokens * (4 * 4 * model.config.hidden_size + 8 * windows * align_up(ctx, 256))


def logits_rows(model: Model) -> int:
    """Rows of logits computed at once when all are wanted; never a function of the budget, see MICRO_BATCH_TOKENS."""
    return min(MICRO_BATCH_TOKENS, max(1, LOGITS_BYTES // (4 * model.config.vocab_size)))


def make_demand(
    model: Model, *, ctx: int, in_parts: bool, kv_bytes: int, workspace_bytes: int, prompt_bytes: int,
    micro_batch_bytes: int, lends: bool, base_bytes: int, rates: Rates, budget_bytes: int | None,
    device_fixed: Mapping[str, int] | None = None, curves: Sequence[Curve] = (), shares: bool = False,
    kv_streamed_bytes: int = 0,
    host_attention_bytes: int | None = None,
) -> Demand:  # fmt: skip
    """The demand of `model` at context `ctx`.

    Args:
        in_parts: whether matrices move in parts by rows, each used by itself, or whole and with all others of their stage.
        workspace_bytes: what the backend's graphs need for a few tokens. prompt_bytes: that prompts need in addition.
        micro_batch_bytes: that each micro-batch of a prompt does.
        lends: whether memory that is idle can hold weights.
        base_bytes: what the process uses before anything of the model is loaded.
        budget_bytes: None for the least that works.
        device_fixed: what is always on the device, when computing happens there.
        curves: how often experts hit, bank by bank, from a trace; see `BankDemand`.
        shares: whether the host computes beside a device.
        kv_streamed_bytes: of the cache, what is read from disk for a token at the end of a full context.
        host_attention_bytes: what attention takes of host memory beside the cache, where layers may keep keys and values
            there; None where all are on the device.
    """
    blocks = model_blocks(model, in_parts=in_parts)
    per_batch = micro_batch_nbytes(model, ctx) + micro_batch_bytes
    rows = min(MICRO_BATCH_TOKENS, ctx)
    compute_s = compute_seconds(model, rates)
    banks = model_banks(model, curves)
    everything = sum(block.footprint for block in blocks) + sum(bank.slot_bytes * bank.num_experts for bank in banks)
    missing = max(0, everything + kv_bytes + base_bytes - (budget_bytes or 0))
    per_pass = micro_batches_per_pass(
        per_batch, budget_bytes, missing / rates.disk_bps, rows * compute_s / BATCH_SPEEDUP, lends=lends
    )
    for_few = _pass_nbytes(model, ctx, min(FEW_TOKENS, ctx), logits=1)
    workspace_bytes += for_few
    prompt_bytes += per_pass * per_batch + _table_scratch(model.embedding, rows) + _logits(model, logits_rows(model))
    prompt_bytes -= for_few
    fixed = {
        "base": base_bytes,
        "margin": MARGIN_BYTES,
        "vectors": sum(_vector_nbytes(model, name) for name in model.vectors),
        "kv": align_up(kv_bytes),
        "workspace": workspace_bytes + prompt_bytes,
    }
    return Demand(
        blocks=blocks,
        banks=banks,
        groups=tuple((i,) for i in range(len(blocks))) if in_parts else _stage_groups(model),
        embedding=_table(model),
        fixed=fixed,
        compute_s=compute_s,
        attention_s=_attention_seconds(model, rates.attention_s if device_fixed is None else rates.device_attention_s, ctx),
        fetch_s=FETCH_LAYER_S * len(model.experts),
        disk_bps=rates.disk_bps,
        kv_streamed_bytes=kv_streamed_bytes,
        dense_bps=dense_rate(model, rates),
        expert_bps=expert_rate(model, rates),
        shared=_shared(model, blocks) if shares else frozenset(),
        link_bps=rates.link_bps,
        device_fixed=device_fixed,
        kv=_kv_demand(model, ctx, rates, device_fixed, host_attention_bytes),
        ctx=ctx,
        trained_ctx=model.config.context_length,
        prefill_tokens_per_pass=per_pass * rows,
        kv_bucket_tokens=KV_BUCKET,
        kv_bucket_bytes=kv_bytes // (align_up(ctx, KV_BUCKET) // KV_BUCKET) if lends else 0,
        prompt_bytes=prompt_bytes if lends else 0,
    )  # fmt: skip


def _table(model: Model) -> BlockSpec | None:
    """The token table, where it is a matrix of its own."""
    table = model.embedding
    if is_tied(model):
        return None
    return BlockSpec(key=BlockKey("weight", -1, table.name), nbytes=table.nbytes, extent=table.extent)


def _stage_groups(model: Model) -> tuple[tuple[int, ...], ...]:
    first, groups = 0, []
    for stage in model.stages:
        groups.append(tuple(range(first, first + len(stage.matrices))))
        first += len(stage.matrices)
    return tuple(groups)


def compute_seconds(model: Model, rates: Rates) -> float:
    """Kernel time of one token at the start of a context: every matrix once, at the rate of its type, and its experts."""
    kernel_bps = rates.device_bps or rates.kernel_bps
    default = min(kernel_bps.values(), default=DEFAULT_KERNEL_BPS)
    used = [matrix for layer in model.experts.values() for matrix in layer.experts[0] for _ in range(layer.num_used)]

    def seconds(matrices: Iterable[TensorInfo]) -> float:
        return sum(info.nbytes / kernel_bps.get(info.element.name, default) for info in matrices)

    computing = seconds(model.matrices.values()) + seconds(used) / EXPERT_EFFICIENCY
    return computing + model.config.num_layers * LAYER_OVERHEAD_S


def _shared(model: Model, blocks: Sequence[BlockSpec]) -> frozenset[int]:
    names = shareable(model)
    return frozenset(index for index, block in enumerate(blocks) if block.key.name in names)


def shareable(model: Model) -> frozenset[str]:
    """Matrices whose rows two processors can compute: what stages multiply by, but for routers, and for one by each head.

    The host has kernels for ggml's types only.
    """
    found = {name: model.matrices[name] for stage in model.stages if not stage.routes for name in stage.matrices}
    return frozenset(name for name, info in found.items() if len(info.shape) == 2 and info.element.in_ggml)


def host_knows_experts(model: Model) -> bool:
    """Whether the host has kernels for the experts' types; there must be some."""
    matrices = [matrix for layer in model.experts.values() for matrix in layer.experts[0]]
    return bool(matrices) and all(matrix.element.in_ggml for matrix in matrices)


def dense_rate(model: Model, rates: Rates) -> float:
    """Bytes of matrices that the CPU computes in a second, for one token."""
    matrices = [matrix for matrix in model.matrices.values() if matrix.element.in_ggml]
    seconds = sum(matrix.nbytes / rates.kernel_bps.get(matrix.element.name, DEFAULT_KERNEL_BPS) for matrix in matrices)
    return sum(matrix.nbytes for matrix in matrices) / max(seconds, 1e-12)


def expert_rate(model: Model, rates: Rates) -> float:
    """Bytes of experts that the CPU computes in a second, for one token; 0 where there are none that it can."""
    if not host_knows_experts(model):
        return 0.0
    matrices = next(iter(model.experts.values())).experts[0]
    seconds = sum(matrix.nbytes / rates.kernel_bps.get(matrix.element.name, DEFAULT_KERNEL_BPS) for matrix in matrices)
    return sum(matrix.nbytes for matrix in matrices) / seconds * EXPERT_EFFICIENCY


def _attention_seconds(model: Model, position_s: float, ctx: int) -> float:
    """What attention adds to a token at the end of a full context."""
    return position_s * sum(_reaches(model, ctx))


def _reaches(model: Model, ctx: int) -> tuple[int, ...]:
    """By layer, how many positions a token sees at the end of a full context."""
    return tuple(min(window or ctx, ctx) for window in model.config.sliding_windows)


def _kv_demand(
    model: Model, ctx: int, rates: Rates, device_fixed: Mapping[str, int] | None, host_attention_bytes: int | None
) -> KVDemand | None:
    if device_fixed is None or host_attention_bytes is None:
        return None
    return KVDemand(
        layer_bytes=device_fixed["kv"] // model.config.num_layers,
        reaches=_reaches(model, ctx),
        device_s=rates.device_attention_s,
        host_s=rates.attention_s,
        crossing_s=rates.crossing_s,
        device_bytes=device_fixed["attention"],
        host_bytes=host_attention_bytes,
    )


def _vector_nbytes(model: Model, name: str) -> int:
    return 4 * prod(model.vectors[name].shape)


def _table_scratch(table: TensorInfo, rows: int) -> int:
    return rows * (align_up(table.row_nbytes) + 4096)


def _pass_nbytes(model: Model, ctx: int, tokens: int, *, logits: int) -> int:
    """What a pass of so many tokens holds beside the backend's graphs, with so many rows of logits."""
    return micro_batch_nbytes(model, ctx, tokens) + _table_scratch(model.embedding, tokens) + _logits(model, logits)


def _logits(model: Model, rows: int) -> int:
    """The backend's logits, the copies handed out, and the sampler's candidates."""
    return 4 * model.config.vocab_size * (rows + 6)
