"""What more memory or a faster disk would buy: the plan made again with one number changed. Pure arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal, NamedTuple

from offload.plan import Plan
from offload.planning import make_plan, with_budget
from offload.units import GIB

WORTH_SAYING: Final = 1.02
FASTER_DISK: Final = 2.0


class Improvement(NamedTuple):
    """One more GiB of `vram` or of `ram`, or a `disk` twice as fast; and how many times as fast tokens come then."""

    what: Literal["vram", "ram", "disk"]
    predicted_tps: float
    factor: float


def improvements(plan: Plan) -> list[Improvement]:
    """Those that gain at least 2%, for tokens at the start of the context."""
    changed: dict[Literal["vram", "ram", "disk"], Plan] = {}
    if plan.device_budget_bytes is not None:
        changed["vram"] = make_plan(plan.demand, plan.budget_bytes, plan.device_budget_bytes + GIB)
    changed["ram"] = with_budget(plan, plan.budget_bytes + GIB)
    changed["disk"] = replace(plan, demand=replace(plan.demand, disk_bps=FASTER_DISK * plan.demand.disk_bps))
    found = (
        Improvement(what, then.predicted_tps, then.predicted_tps / plan.predicted_tps) for what, then in changed.items()
    )
    return [one for one in found if one.factor >= WORTH_SAYING]
