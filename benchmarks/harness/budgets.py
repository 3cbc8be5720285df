"""Loads models with an exact share of their experts in memory, which no `--ram` hits where a model is small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from offload import opening
from offload.demand import Demand
from offload.plan import Plan
from offload.planning import make_plan


@contextmanager
def experts_in_memory(share: float) -> Iterator[None]:
    """Within the block models are planned with all else in memory, this share of the experts, and nothing on loan."""

    def plan(need: Demand, budget: int, device_budget: int | None = None) -> Plan:
        del budget
        fixed = replace(need, kv_bucket_bytes=0, prompt_bytes=0)
        dense = sum(need.fixed.values()) + sum(block.footprint for block in need.blocks)
        slots = sum(max(bank.least_slots, round(share * bank.num_experts)) * bank.slot_bytes for bank in need.banks)
        return make_plan(fixed, dense + slots, device_budget)

    opening.make_plan = plan
    try:
        yield
    finally:
        opening.make_plan = make_plan
