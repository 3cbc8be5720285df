"""What `offload doctor` asks torch, in a process of its own: the cards, their memory, links and kernels, and kvikio."""

from __future__ import annotations

from typing import Any

import torch

from offload.errors import OffloadError
from offload.kernels.torch.probe import measure_memory, measure_products
from offload.kernels.torch.usable import check_usable
from offload.tiers.device_errors import first_line
from offload.tiers.direct import describe_kvikio
from offload.tiers.link import measure_copies


def describe_torch() -> dict[str, Any]:
    """Version, what it is built for, every card that it sees, and kvikio where there is one."""
    cards = [describe_card(f"cuda:{number}") for number in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "built_for_cuda": torch.version.cuda,
        "cuda": cards,
        "mps": torch.backends.mps.is_available(),
        "kvikio": describe_kvikio() if cards else None,
    }


def describe_card(device: str) -> dict[str, Any]:
    """Name and speeds, or why it cannot be used."""
    there = torch.device(device)
    facts: dict[str, Any] = {"device": device}
    try:
        facts["name"] = torch.cuda.get_device_name(there)
        facts["memory_bytes"] = torch.cuda.get_device_properties(there).total_memory
        check_usable(device)
        return facts | measure_card(there)
    except (OffloadError, RuntimeError) as error:
        return {"name": device, "memory_bytes": 0} | facts | {"error": first_line(error)}


def measure_card(device: torch.device) -> dict[str, Any]:
    """Bytes per second: copies by kind and way (None: the system lets no memory be registered), memory, kernels by type."""
    copies = measure_copies(str(device))
    return {
        "copies_bps": {
            "pinned, in": copies.pinned_in,
            "pageable, in": copies.pageable_in,
            "pinned, out": copies.pinned_out,
            "pageable, out": copies.pageable_out,
        },
        "link_bps": copies.pinned_in or copies.pageable_in,
        "memory_bps": measure_memory(device),
        "kernel_bps": dict(measure_products(device)),
    }
