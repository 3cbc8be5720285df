"""Logits of every family against transformers, on random float32 checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import FAMILIES, VOCAB, reference_logits, tiny_checkpoint
from support.running import PlainRunner, relative_error
from support.standin import open_checkpoint

from offload.models.registry import build_model

TOLERANCE = 1e-4
PROMPT = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(7)).tolist()


def runner(folder: Path, ctx: int = 64) -> PlainRunner:
    return PlainRunner(build_model(open_checkpoint(folder), ctx), ctx)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, tmp_path)
    assert relative_error(runner(folder).logits(PROMPT), reference_logits(folder, PROMPT)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, tmp_path)
    run = runner(folder)
    rows = [run.logits([token], start) for start, token in enumerate(PROMPT)]
    assert relative_error(torch.cat(rows), reference_logits(folder, PROMPT)) <= TOLERANCE
