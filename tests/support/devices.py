"""Where kernels run in tests: on the CPU always, and on a card where there is one, which `pytest -m gpu` selects.

Triton decides when it is imported whether its kernels are compiled for a card or interpreted on the CPU, for the whole
process. Where torch can use a card, they are compiled, and the interpreter's variants of tests are skipped; elsewhere it is
the other way round. TRITON_INTERPRET=1 in the environment chooses the interpreter on any machine. It gets no process of its
own beside a card: what it computes does not depend on the machine, and every machine without one runs it.
"""

from __future__ import annotations

import os
from typing import Final

import pytest
import torch

PLACES: Final = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
_VARIABLE: Final = "TRITON_INTERPRET"


def computed_on(device: str) -> dict[str, str]:
    """Options of `offload.load` for a model that is computed there, and by no second processor; caches are exact."""
    return {"device": "torch:cpu" if device == "cpu" else device, "host_compute": "off", "kv_type": "f32"}


def decide_for_triton() -> None:
    """Sets what triton reads when it is imported."""
    os.environ.setdefault(_VARIABLE, "0" if torch.cuda.is_available() else "1")


def torch_runs_on(device: str) -> str:
    """The device; skips where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device


def triton_runs_on(device: str) -> str:
    """The same for Triton's kernels."""
    interprets = os.environ[_VARIABLE] == "1"
    if torch_runs_on(device) == "cpu" and not interprets:
        pytest.skip(f"Triton compiles for the card in this process; {_VARIABLE}=1 interprets")
    if device == "cuda" and interprets:
        pytest.skip(f"{_VARIABLE}=1: Triton interprets in this process")
    return device
