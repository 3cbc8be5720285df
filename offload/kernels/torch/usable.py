"""Whether torch can compute on a device: a driver that is found may still be too old, or the card too old for the build."""

from __future__ import annotations

import torch

from offload.errors import BackendError
from offload.kernels.torch.backend import check_device
from offload.tiers.device_errors import first_line


def check_usable(device: str) -> None:
    """
    Raises:
        BackendError: torch does not know the device, or a first small kernel fails there.
    """
    check_device(device)
    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except RuntimeError as error:
        raise BackendError(
            f"device {device}: a first kernel fails there ({first_line(error)}); check nvidia-smi and that this torch is "
            "built for the card, or use --device cpu"
        ) from error
