"""Buffers and files for the tier tests."""

from __future__ import annotations

import random

import pytest

from offload.tiers.ram import Slab
from offload.units import MIB, PAGE


@pytest.fixture(scope="session")
def content() -> bytes:
    """Five pages and a torn one."""
    return random.Random(7).randbytes(5 * PAGE + 123)


@pytest.fixture
def slab():
    slab = Slab(2 * MIB)
    yield slab
    slab.close()
