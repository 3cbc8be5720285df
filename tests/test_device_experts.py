"""Experts held by a device, and copies that visit it: the same bits wherever they lie, within the budget, no idle wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint
from support.devices import computed_on
from support.gguf_checkpoints import gguf_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from offload.bank_plan import BankDemand, device_bytes, num_visiting, share_device, visiting_bytes
from offload.errors import BudgetError
from offload.expert_slots import HELD
from offload.kernels.batch import ExpertPlace
from offload.kernels.torch.backend import TorchBackend
from offload.kernels.torch.experts import TorchExperts
from offload.kernels.torch.products import FEW_TOKENS, DecodedProducts
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model
from offload.units import PAGE

PROMPT = [7 * n % 250 for n in range(40)]
FEW = PROMPT[:FEW_TOKENS]
HELD_AT = 1 << 30


def hold(monkeypatch: pytest.MonkeyPatch, share: float, visiting: int | None = None) -> None:
    """Has the device hold this share of the experts of each bank, and gives others so many slots."""
    monkeypatch.setattr(
        "offload.planning.share_device", lambda banks, available: tuple(int(share * bank.num_experts) for bank in banks)
    )
    if visiting is not None:
        monkeypatch.setattr("offload.planning.num_visiting", lambda banks, available, held: visiting)


@pytest.mark.parametrize(
    ("family", "element"), [("olmoe", "Q8_0"), ("gpt_oss", "MXFP4"), ("deepseek_v2", "F16"), ("qwen2_moe", "BF16")]
)
def test_the_bits_of_a_token_do_not_depend_on_where_its_experts_lie(
    family: str, element: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held and computed in the pass; held, and computed between two pieces; visiting one, three or many slots; from disk."""
    model, seen = gguf_checkpoint(family, tmp_path, element), []
    cut = {"skip_experts_below": 1e-9}
    for share, visiting, options in (
        (1.0, 0, {}), (1.0, 0, cut), (0.6, 1, {}), (0.5, 3, {}), (0.0, None, {}), (0.3, None, {"ram": "minimum"}),
    ):  # fmt: skip
        hold(monkeypatch, share, visiting)
        with offload.load(model, ctx=64, **computed_on(device), **options) as engine:
            assert (engine._runner.scheduler._experts is None) == (share == 1.0 and not options)
            seen.append((engine.logits(PROMPT), engine.logits(FEW), engine._stepwise_logits(FEW[:4])))
            assert engine._runner.telemetry.experts_skipped == 0
    for found in seen[1:]:
        for logits, expected in zip(found, seen[0], strict=True):
            assert np.array_equal(logits, expected)


# ---- what the host waits for


class Watched(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers that leave it, and shapes that depend on them."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        booleans = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.WAITS or booleans:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v2"])
def test_a_model_whose_experts_are_all_held_decodes_without_waiting_for_the_device(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, pieces, copied = Watched(), [], []
    run, cpu = TorchBackend.run, torch.Tensor.cpu

    def watch(self: TorchBackend, piece: int, batch: int) -> float:
        pieces.append(piece)
        with watched:
            return run(self, piece, batch)

    def count(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.shape)
        return cpu(tensor)

    with offload.load(tiny_checkpoint(family, tmp_path), ctx=64, device="torch:cpu") as engine:
        answer = engine.generate(PROMPT, max_tokens=1, temperature=0, ignore_eos=True)
        assert answer.experts is None and engine.statistics().experts is None
        assert engine.plan.device_visiting == 0 and engine.plan.expert_share == 1.0
        monkeypatch.setattr(TorchBackend, "run", watch)
        monkeypatch.setattr(TorchBackend, "routed", None)
        monkeypatch.setattr(torch.Tensor, "cpu", count)
        engine.generate([*PROMPT, *answer.tokens], max_tokens=4, temperature=0, ignore_eos=True)
        vocab = engine._runner.opened.model.config.vocab_size
    assert pieces == 4 * [0], "one piece for each token"
    assert watched.waits == [] and copied == 4 * [(1, vocab)], "the logits, and nothing else"


def test_a_choice_is_fetched_once_where_experts_have_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, 0.5)
    model = gguf_checkpoint("olmoe", tmp_path, "Q8_0")
    with offload.load(model, ctx=64, device="torch:cpu") as engine:
        layers, used = len(engine._runner.opened.model.experts), engine._runner.opened.model.experts[0].num_used
        engine.generate(PROMPT, max_tokens=1, temperature=0, ignore_eos=True)
        copied, cpu = [], torch.Tensor.cpu
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (copied.append(tensor.shape), cpu(tensor))[1])
        before = engine.statistics().experts
        engine.generate([*PROMPT, 3], max_tokens=1, temperature=0, ignore_eos=True)
        used_since = engine.statistics().experts.since(before)
        assert copied.count((1, used)) == layers and len(copied) == layers + 1
        assert used_since.demanded == layers * used and used_since.hit_rate == 1.0


# ---- visitors


class Arena:
    """A tier that writes down what is asked of it."""

    device = torch.device("cpu")
    capacity_bytes = 1 << 40

    def __init__(self, log: list[tuple[str, object]]) -> None:
        self.log, self.copies = log, 0

    def copy_parts(self, parts: list[tuple[memoryview, int]]) -> int:
        self.copies += 1
        self.log.append(("copy", [offset for _, offset in parts[::3]]))
        return self.copies

    def order(self, handle: int) -> None:
        self.log.append(("order", handle))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_model(open_checkpoint(tiny_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"))), 64)


@settings(max_examples=200, deadline=None)
@given(
    visiting=st.integers(1, 9), missing=st.integers(0, 8), held=st.integers(0, 8), together=st.booleans(),
)  # fmt: skip
def test_a_slot_is_copied_into_when_its_kernels_are_queued_and_others_run_ahead(
    olmoe: Any, visiting: int, missing: int, held: int, together: bool
) -> None:
    held = min(held, 8 - missing)
    log: list[tuple[str, object]] = []
    experts = TorchExperts(olmoe, Arena(log), DecodedProducts())  # type: ignore[arg-type]
    memory = np.zeros(64, np.uint8)
    experts.place(0, ExpertPlace(memory.ctypes.data, 0, 8, (0, 0, 0), is_resident=False))
    experts.place_held(0, ExpertPlace(HELD_AT, 4096, 8, (0, 0, 0), is_resident=False))
    slots = [4096 * number for number in range(visiting)]
    experts.place_visiting(slots)
    choice = {expert: expert if expert < missing else HELD + expert for expert in range(missing + held)}
    computed: list[Mapping[int, int]] = []
    for lying in experts._arrivals(0, choice, together=together):
        log.append(("compute", sorted(lying.values())))
        computed.append(dict(lying))
    assert sorted(expert for group in computed for expert in group) == list(choice)
    there = [HELD_AT + 4096 * expert for expert in range(missing, missing + held)]
    assert not held or next(about for what, about in log if what == "compute") == there, "the held ones first"
    occupied, ordered, copies = set(), 0, 0
    for what, about in log:
        if what == "copy":
            assert isinstance(about, list) and set(about) <= set(slots) and not occupied & set(about)
            occupied |= set(about)
            copies += 1
        elif what == "order":
            assert about == ordered + 1 <= copies, "in the order in which they were started"
            ordered += 1
        elif about != there:
            assert isinstance(about, list) and set(about) <= occupied and ordered
            occupied -= set(about)
    ahead = [name for name, _ in log].index("compute") if computed else 0
    started = sum(len(about) for name, about in log[:ahead] if name == "copy")  # type: ignore[arg-type]
    assert started == missing or started >= max(1, visiting - 1 if together else visiting), "all that there is room for"
    if together:
        assert len(computed) <= bool(held) + -(-missing // max(1, visiting // 2))


def test_host_memory_is_not_read_into_before_its_copies_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every submission of reads is preceded by a wait for copies, also of those that the bank evicts for a later layer."""
    hold(monkeypatch, 0.3)
    log: list[str] = []
    model = gguf_checkpoint("olmoe", tmp_path, "Q8_0")
    with offload.load(model, ctx=64, device="torch:cpu", ram="minimum") as engine:
        experts, tier = engine._runner.backend.experts, engine._runner.backend._tier
        copy, read = tier.copy_parts, engine._runner.reader.read_groups

        def copying(parts: list[tuple[memoryview, int]]) -> SimpleNamespace:
            log.append("copy")
            copy(parts)
            return SimpleNamespace(wait=lambda: log.append("ended"))

        def reading(groups: Any, **options: Any) -> Any:
            if groups:
                assert "copy" not in log[len(log) - log[::-1].index("ended") :] if "ended" in log else "copy" not in log
                log.append("read")
            return read(groups, **options)

        monkeypatch.setattr(tier, "copy_parts", copying)
        monkeypatch.setattr(engine._runner.reader, "read_groups", reading)
        engine.generate(PROMPT, max_tokens=6, temperature=0, ignore_eos=True)
        assert experts._visiting
    assert min(log.count(what) for what in ("copy", "ended", "read")) > 3


# ---- what it costs


@st.composite
def demands(draw: st.DrawFn) -> list[BankDemand]:
    return [
        BankDemand(slot_bytes=nbytes + 3 * PAGE, expert_bytes=nbytes, num_experts=draw(st.integers(2, 40)),
                   least_slots=draw(st.integers(1, 2)), used=2)
        for nbytes in draw(st.lists(st.integers(1, 50_000), min_size=1, max_size=3))
    ]  # fmt: skip


@given(banks=demands(), more=st.integers(0, 3_000_000))
def test_held_and_visiting_experts_fit_and_there_is_always_a_way_to_compute(banks: list[BankDemand], more: int) -> None:
    available = visiting_bytes(banks, 1) + more
    held = share_device(banks, available)
    visiting = num_visiting(banks, available, held)
    assert device_bytes(banks, held, visiting) <= available
    if all(count == bank.num_experts for count, bank in zip(held, banks, strict=True)):
        assert visiting == 0
        return
    wanted = 2 * max(bank.least_slots for bank in banks)
    assert 1 <= visiting <= wanted
    if any(held):
        assert visiting == wanted, "others are held when a choice can be copied while one is computed"


def test_the_least_that_is_named_for_a_device_is_enough(tmp_path: Path) -> None:
    model: Path = gguf_checkpoint("olmoe", tmp_path, "Q8_0")
    load: Callable[..., offload.Engine] = offload.load
    with load(model, ctx=64, kv_type="f32", device="torch:cpu") as engine:
        expected = engine.logits(PROMPT)
    with pytest.raises(BudgetError) as caught:
        load(model, ctx=64, kv_type="f32", device="torch:cpu", vram=1)
    least = caught.value.minimum_bytes
    with pytest.raises(BudgetError):
        load(model, ctx=64, kv_type="f32", device="torch:cpu", vram=least - 1)
    with load(model, ctx=64, kv_type="f32", device="torch:cpu", vram=least) as engine:
        assert engine.plan.device_visiting >= 1 and np.array_equal(engine.logits(PROMPT), expected)
        assert sum(engine.plan.demand.device_fixed.values()) + engine._runner.backend._tier.capacity_bytes <= least
