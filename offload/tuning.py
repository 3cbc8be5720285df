"""What is known of one model's experts on this machine: the policy that suits it, and how often it will hit.

Found by replaying a recorded trace, or by `offload tune`, which decodes for real. Kept by the model's fingerprint in the
user's cache folder, beside the trace itself. A broken or foreign file counts as none: there are defaults.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
from platformdirs import user_cache_path

from offload.blocks import ExpertKey
from offload.config import MAX_THREADS, Prefetch
from offload.errors import CheckpointError, StorageError
from offload.machine import host_fingerprint, write_record
from offload.prefetch.policies import DEFAULT_EVICTION, EVICTION
from offload.prefetch.replay import replay
from offload.prefetch.routing import RoutingTrace, legible
from offload.prefetch.trace_file import read_routing

_FORMAT: Final = 2
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{8,128}")
LEAST_TOKENS: Final = 128  # of a trace from which anything is learned
CURVE_SHARES: Final = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
REPLAYED_TOKENS: Final = 768
WARM_UP_TOKENS: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What to use for a model.

    Attributes:
        policy: which expert makes room, by its name in `prefetch.policies`. prefetch: whether experts are read ahead.
        workers: requests in flight; None for the default.
        curves: of each bank, hit rates by share of its experts that memory holds; empty when there is no trace.
        by: how it was found. tokens: of the trace. origin: of the trace, for people.
    """

    policy: str = DEFAULT_EVICTION
    prefetch: Prefetch = "auto"
    workers: int | None = None
    curves: tuple[tuple[tuple[float, float], ...], ...] = ()
    by: Literal["replay", "trial"] = "replay"
    tokens: int = 0
    origin: str = ""


def load_tuning(model: str) -> Tuning | None:
    """What was found for the model of this fingerprint on this machine, or None."""
    try:
        record = json.loads(tuning_path(model).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return _parse(record)


def save_tuning(model: str, tuning: Tuning) -> Path:
    """Writes in one step.

    Raises:
        StorageError: the folder cannot be written.
    """
    path = tuning_path(model)
    record = {"format": _FORMAT, "host": host_fingerprint(), **asdict(tuning)}
    write_record(path, record)
    return path


def tuning_path(model: str) -> Path:
    """Where it is kept."""
    return _folder() / f"{_checked(model)}.json"


def trace_path(model: str) -> Path:
    """Where the model's trace is kept, unless the user names another place."""
    return _folder() / f"{_checked(model)}.trace"


def tune_by_replay(trace: RoutingTrace, share: float) -> Tuning:
    """The policy with the best hit rate when memory holds this share of the experts, and its curve for each bank.

    The default stays unless another is better by more than two standard errors of what so many demands can tell.
    """
    rates = {name: hit_rate(trace, name, share) for name in EVICTION}
    best = max(rates, key=lambda name: rates[name])
    demands = min(trace.num_tokens, REPLAYED_TOKENS) * len(trace.layers) * trace.num_used
    by_chance = 2 * math.sqrt(rates[best] * (1 - rates[best]) / demands)
    policy = best if rates[best] > rates[DEFAULT_EVICTION] + by_chance else DEFAULT_EVICTION
    curves = tuple(
        tuple((part, hit_rate(trace.of_bank(bank), policy, part)) for part in CURVE_SHARES)
        for bank in trace.rows_of_bank
    )
    return Tuning(policy=policy, curves=curves, tokens=trace.num_tokens, origin=legible(trace.origin))


def learn(trace: RoutingTrace, share: float) -> Tuning:
    """What a new trace tells, with what decoding for real has shown before. Not saved."""
    replayed, known = tune_by_replay(trace, share), load_tuning(trace.model)
    if known is None or known.by == "replay":
        return replayed
    return replace(known, curves=replayed.curves, tokens=replayed.tokens, origin=replayed.origin)


def popularity(model: str) -> Mapping[ExpertKey, int]:
    """How often the model's recorded trace chose each expert; nothing where there is none, or none that can be believed."""
    try:
        trace = read_routing(trace_path(model))
    except (StorageError, CheckpointError):
        return {}
    counts: Counter[ExpertKey] = Counter()
    for row, layer in enumerate(trace.layers):
        chosen = trace.choices[:, row].reshape(-1)
        found = np.bincount(chosen[chosen >= 0], minlength=trace.num_experts)
        counts.update({ExpertKey(layer, expert): int(count) for expert, count in enumerate(found) if count})
    return counts


def hit_rate(trace: RoutingTrace, policy: str, share: float) -> float:
    """Of the last tokens of a trace, when memory holds this share of its experts."""
    recent = trace.last(REPLAYED_TOKENS)
    return replay(
        recent, recent.share(share), EVICTION[policy], warm_up=min(WARM_UP_TOKENS, recent.num_tokens // 4)
    ).hit_rate


def _folder() -> Path:
    return user_cache_path("offload") / "experts"


def _checked(model: str) -> str:
    assert _FINGERPRINT.fullmatch(model), model
    return model


def _parse(record: Any) -> Tuning | None:
    if not isinstance(record, dict) or record.pop("format", None) != _FORMAT:
        return None
    if record.pop("host", None) != host_fingerprint() or record.keys() != set(Tuning.__slots__):
        return None
    workers, curves = record["workers"], record["curves"]
    texts = [record[name] for name in ("policy", "prefetch", "by", "origin")]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        return None
    sound = (
        record["policy"] in EVICTION
        and record["prefetch"] in get_args(Prefetch)
        and (workers is None or _is_whole(workers, 1, MAX_THREADS))
        and record["by"] in ("replay", "trial")
        and _is_whole(record["tokens"], 0, 1 << 40)
        and isinstance(curves, list)
        and all(map(_is_curve, curves))
    )
    if not sound:
        return None
    return Tuning(**{**record, "curves": tuple(tuple((float(x), float(y)) for x, y in curve) for curve in curves)})


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_curve(curve: Any) -> bool:
    if not isinstance(curve, list) or not all(isinstance(point, list) and len(point) == 2 for point in curve):
        return False
    numbers = [number for point in curve for number in point]
    if not all(isinstance(number, int | float) and 0 <= number <= 1 for number in numbers):  # no NaN, nor infinity
        return False
    shares = [point[0] for point in curve]
    return shares == sorted(set(shares)) and all(0 < share < 1 for share in shares)
