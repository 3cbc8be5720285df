"""What `device="auto"` means on this machine: a card where one can be used, else the CPU, and why a card is left alone.

A cheap look comes first, so that torch is imported only where there is a card that it may be able to use.
"""

from __future__ import annotations

import re
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

from offload.errors import BackendError
from offload.tiers.cuda_driver import find_cards

_BUILT_FOR: Final = re.compile(r"^cuda\b[^=\n]*=\s*(.+?)\s*$", re.MULTILINE)
WITH_CUDA: Final = "pip install --force-reinstall torch, or the line for your system from https://pytorch.org"


class Choice(NamedTuple):
    """A torch device, or None for the CPU; `note` says why a card that is there is not used, and what would help."""

    device: str | None
    note: str = ""


@cache
def choose_device() -> Choice:
    """Asked once: neither driver nor torch changes under a running process."""
    cards = find_cards()
    if cards.error:
        return _leave(f"the NVIDIA driver does not start (CUDA error {cards.error}); check nvidia-smi, or start anew")
    if not cards.num_cards:
        return Choice(None)
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return _leave("torch is not installed: pip install torch")
    if _is_built_without_cuda(Path(torch.origin)):
        return _leave(f"this torch is built without CUDA: {WITH_CUDA}")
    from offload.kernels.torch.usable import check_usable

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of an old driver in several lines; one of ours follows
            check_usable("cuda")
    except (BackendError, ImportError) as error:
        return _leave(str(error))
    return Choice("cuda")


def _leave(reason: str) -> Choice:
    return Choice(None, f"--device auto takes the CPU although there is a card: {reason}")


def _is_built_without_cuda(package: Path) -> bool:
    """Read from torch's `version.py`, since importing it would cost what this is to save; False where that is not clear."""
    try:
        found = _BUILT_FOR.search(package.with_name("version.py").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return found is not None and found[1] == "None"
