"""Constants rounded as llama.cpp rounds them: a last bit in an attention scale is a last bit in every logit."""

from __future__ import annotations

import numpy as np


def inverse_sqrt(value: int) -> float:
    """`1 / sqrt(value)`, each step rounded to float32."""
    return float(np.float32(1.0) / np.sqrt(np.float32(value)))
