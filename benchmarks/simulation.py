"""Decoding an 8B model on three machines on a virtual clock: how busy the slowest of disk, link and card is.

    python benchmarks/simulation.py

The plan and the streams are the engine's own, transfers and kernels take the time that their bytes take; the machines and
their bandwidths are those of tests/test_device_simulation.py, which asserts what is shown here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product

from harness.results import ROOT, table, write

sys.path.insert(0, str(ROOT / "tests"))
from test_device_simulation import MACHINES, plan_at, simulate

VRAM, RAM = (0.1, 0.25, 0.5, 0.75, 0.9), (0.25, 0.5, 1.0)
HEADER = ("machine", "of the weights in VRAM", "RAM for", "disk", "link", "card", "slowest", "busy", "tokens/s")


def lines() -> Iterator[list[str]]:
    for (name, machine), vram, ram in product(MACHINES.items(), VRAM, RAM):
        plan = plan_at(machine, vram, ram)
        run = simulate(machine, plan, queued=True)
        seconds = {
            "disk": plan.streamed_bytes / machine.disk_bps,
            "link": plan.link_bytes / machine.link_bps,
            "card": plan.demand.compute_s,
        }
        slowest = max(seconds, key=lambda edge: seconds[edge])
        busy = {"disk": run.disk_busy, "link": run.link_busy, "card": plan.demand.compute_s / run.token_s}[slowest]
        times = [f"{1e3 * each:.0f} ms" for each in seconds.values()]
        yield [name, f"{vram:.0%}", f"{ram:.0%}", *times, slowest, f"{busy:.0%}", f"{1 / run.token_s:.3g}"]


if __name__ == "__main__":
    body = "No card: a virtual clock. Seconds are what a token moves over an edge at its bandwidth.\n\n" + table(
        HEADER, list(lines())
    )
    print(f"{body}\n\n{write('device_simulation', body)}")
