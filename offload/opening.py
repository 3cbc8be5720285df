"""From a path to a description and a plan: headers, tokenizer, rates, budget. No weight is read here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from offload.config import MICRO_BATCH_TOKENS, LoadConfig
from offload.demand import Demand, make_demand, micro_batch_nbytes
from offload.device_choice import choose_device
from offload.elements import KVTypes
from offload.errors import BudgetError, UnsupportedError, UsageError
from offload.kernels.ggml.cache import cache_nbytes
from offload.kernels.ggml.probe import PROBE_BYTES
from offload.models.base import Model
from offload.models.checkpoint import open_checkpoint
from offload.models.checkpoint.base import Checkpoint
from offload.models.registry import build_model, default_context
from offload.models.text import open_tokenizer
from offload.models.text.base import Tokenizer
from offload.packing import Pack, open_pack
from offload.plan import Plan
from offload.planning import make_plan, minimum_budget
from offload.rates import default_threads, machine_rates
from offload.tiers.cgroup import available_memory
from offload.tiers.heap import trim_heap
from offload.tuning import Tuning, load_tuning
from offload.units import GIB, MIB, align_up, format_size

_LOG: Final = logging.getLogger("offload")
DEFAULT_CTX: Final = 4096
_BASE_STEP: Final = 8 * MIB
_SMALL_PROBE_BYTES: Final = 24 * MIB  # within the least that any model needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint described, before any memory is planned. `device` is a torch device, None for the ggml backend.

    `pack`: a side file with halves of its experts.
    """

    checkpoint: Checkpoint
    model: Model
    tokenizer: Tokenizer | None
    ctx: int
    threads: int
    device: str | None = None
    pack: Pack | None = None

    def close(self) -> None:
        """Frees the tokenizer. Idempotent."""
        if self.tokenizer is not None:
            self.tokenizer.close()


def open_model(path: str | Path, config: LoadConfig) -> Opened:
    """Reads headers and the tokenizer, and describes the model.

    Raises:
        CheckpointError, UnsupportedError: the file is malformed, or nothing that this version runs.
        UsageError: an option does not fit the model or the machine.
        BudgetError: a context that the machine's memory cannot hold.
    """
    device = torch_device(config)
    checkpoint = open_checkpoint(path)
    ctx = config.ctx or min(default_context(checkpoint), DEFAULT_CTX)
    model = build_model(checkpoint, ctx)
    if device is None:
        _check_types(checkpoint, model)
    _check_kv_types(config.kv_types, model, device)
    cache = 0 if device is None else cache_nbytes(model, ctx, config.kv_types)  # which may lie on disk
    _check_context(ctx, cache + micro_batch_nbytes(model, ctx))
    return Opened(
        checkpoint=checkpoint,
        model=model,
        tokenizer=open_tokenizer(checkpoint),
        ctx=ctx,
        threads=config.threads or default_threads(),
        device=device,
        pack=None if config.expert_pack is None else open_pack(config.expert_pack, checkpoint, model),
    )


def _check_types(checkpoint: Checkpoint, model: Model) -> None:
    """
    Raises:
        UnsupportedError: the CPU has no kernels for the type of a matrix.
    """
    for matrix in model.all_matrices():
        if not matrix.element.in_ggml:
            raise UnsupportedError(
                f"{checkpoint.path}: {matrix.name} is {matrix.element}, for which the CPU's kernels (ggml) have no type; "
                "use a torch device (--device cuda, or torch:cpu), or a GGUF or a bfloat16 version of the model"
            )


def _check_context(ctx: int, needed: int) -> None:
    """Refuses at once what no budget of this machine could hold; what the budget holds is the plan's business.

    Raises:
        BudgetError: cache and attention masks alone are larger than the machine.
    """
    machine = psutil.virtual_memory().total
    if needed > machine:
        raise BudgetError(
            f"--ctx {ctx}: its KV cache needs {format_size(needed)}, this machine has {format_size(machine)}; lower --ctx",
            budget_bytes=machine,
            minimum_bytes=needed,
        )


def _check_kv_types(types: KVTypes, model: Model, device: str | None) -> None:
    """
    Raises:
        UnsupportedError: a type that the device's attention does not read, or whose blocks do not divide a head.
    """
    for what, element, dims in zip(("keys", "values"), types, model.config.cache_dims, strict=False):
        name = f"a KV cache with {what} of {element.name.lower()}"
        if device is not None and element.is_quantized:
            raise UnsupportedError(
                f"{name}: device {device} computes with f16, bf16 or f32; choose one of them by --kv-type, or --device cpu"
            )
        if dims % element.block_elements:
            raise UnsupportedError(
                f"{name}: a head of them has {dims} features (head_dim), not a multiple of {element.block_elements}; choose "
                "f16, bf16 or f32 by --kv-type"
            )


def torch_device(config: LoadConfig) -> str | None:
    """The torch device that `config.device` names, or None for the CPU kernels of ggml.

    Raises:
        UsageError: no such device, or a VRAM budget without one.
    """
    name = config.device
    if name == "auto":
        return _automatic(config)
    if name == "cpu":
        if config.vram is not None:
            raise UsageError("vram: device 'cpu' computes in host memory; choose --device cuda or torch:cpu")
        return None
    device = name.removeprefix("torch:")
    if device != "cpu" and not device.startswith("cuda"):
        raise UsageError(f"device {name!r}: choose auto, cpu, cuda, cuda:0 or torch:cpu")
    return device


def _automatic(config: LoadConfig) -> str | None:
    choice = choose_device()
    if choice.device is None and config.vram is not None:
        reason = choice.note or "--device auto finds no card"
        raise UsageError(f"vram: {reason}; leave --vram out, or choose --device torch:cpu")
    if choice.note:
        _LOG.info("%s", choice.note)
    return choice.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a backend needs beside the matrices: bytes in host RAM, and by purpose on the device (None: no device).

    Attributes:
        kv_streamed_bytes: of the cache, what is read from disk for a token at the end of a full context.
        in_parts: whether matrices move in parts by rows.
        workspace_bytes: for passes of a few tokens. prompt_bytes: that longer ones need in addition, and micro_batch_bytes
            that each of their micro-batches does.
        shares: whether the host computes beside the device. host_attention_bytes: what attention takes of host memory beside
            the cache, where layers may keep keys and values there; None where all are on the device.
        lends: whether what the cache and prompts do not use can be given back to the system, and so be lent to weights.
    """

    in_parts: bool
    kv_bytes: int
    kv_streamed_bytes: int = 0
    workspace_bytes: int
    prompt_bytes: int = 0
    micro_batch_bytes: int = 0
    lends: bool = False
    device_fixed: dict[str, int] | None = None
    device_budget_bytes: int | None = None
    shares: bool = False
    host_attention_bytes: int | None = None


def plan_for(opened: Opened, config: LoadConfig, footprint: Footprint) -> Plan:
    """The plan under the configured budgets.

    Raises:
        BudgetError: a budget is below what the model needs.
    """
    roomy_probe = config.ram is None or (config.ram != "minimum" and config.ram >= GIB)
    rates = machine_rates(
        opened.checkpoint,
        opened.model,
        config.kv_types,
        opened.threads,
        PROBE_BYTES if roomy_probe else _SMALL_PROBE_BYTES,
        opened.device,
    )
    trim_heap()  # what parsing left behind
    base = align_up(psutil.Process().memory_info().rss + 4 * MIB, MIB)

    tuning = known_tuning(opened)
    curves = () if tuning is None else tuning.curves

    def demand(budget: int | None, base_bytes: int) -> Demand:
        return make_demand(
            opened.model, ctx=opened.ctx, in_parts=footprint.in_parts, kv_bytes=footprint.kv_bytes,
            workspace_bytes=footprint.workspace_bytes, prompt_bytes=footprint.prompt_bytes,
            micro_batch_bytes=footprint.micro_batch_bytes, lends=footprint.lends, base_bytes=base_bytes, rates=rates,
            budget_bytes=budget, device_fixed=footprint.device_fixed, curves=curves,
            shares=footprint.shares, kv_streamed_bytes=footprint.kv_streamed_bytes,
            host_attention_bytes=footprint.host_attention_bytes,
        )  # fmt: skip

    # the minimum that is named, to a person or by "minimum", still holds when the process is a little larger next time
    named, device_budget = demand(None, align_up(base, _BASE_STEP) + _BASE_STEP), footprint.device_budget_bytes
    if config.ram == "minimum":
        return make_plan(named, minimum_budget(named, device_budget), device_budget)
    budget = config.ram if config.ram is not None else default_budget(base)
    for candidate in (demand(budget, base), demand(None, base)):
        if budget >= minimum_budget(candidate, device_budget):
            plan = make_plan(candidate, budget, device_budget)
            return replace(plan, minimum_bytes=min(budget, minimum_budget(named, device_budget)))
    return make_plan(named, budget, device_budget)


def known_tuning(opened: Opened) -> Tuning | None:
    """What was found out about the model's experts on this machine, if it has any."""
    return load_tuning(opened.checkpoint.fingerprint) if opened.model.experts else None


def default_budget(base_bytes: int) -> int:
    """What this process uses and what the machine has free, less a tenth and at least a quarter of a GiB for others."""
    free = available_memory()
    return base_bytes + free - max(free // 10, GIB // 4)


def micro_batch_tokens(opened: Opened) -> int:
    """Tokens of the largest graph."""
    return min(MICRO_BATCH_TOKENS, opened.ctx)


Progress = Callable[[str, int, int], None]
