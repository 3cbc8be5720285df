"""Side files hold every bit twice over in halves; coarse experts are what the high half says, and become exact again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import tiny_checkpoint
from support.gguf_checkpoints import gguf_checkpoint
from test_expert_bad_days import few_slots

import offload
from offload.bitplanes import expand, refine, split
from offload.blocks import ExpertKey, Extent
from offload.errors import CheckpointError, OffloadError, StorageError, UnsupportedError, UsageError
from offload.expert_bank import expert_banks
from offload.expert_slots import ExpertBank
from offload.models.base import Model
from offload.models.checkpoint import open_checkpoint
from offload.models.registry import build_model
from offload.packing import Pack, open_pack, write_pack
from offload.prefetch.policies import make_eviction
from offload.tiers.files import LocalStorage
from offload.tiers.memory import MemoryReader
from offload.tiers.ram import Slab

TRAINED = Path(__file__).parent / "assets" / "trained_moe" / "stdlib-olmoe-Q8_0.gguf"
PROMPT = [7 * n % 4000 for n in range(24)]


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "side.gguf"
    write_pack(TRAINED, path)
    return path


def opened(model_path: Path, side: Path) -> tuple[Model, Pack]:
    checkpoint = open_checkpoint(model_path)
    model = build_model(checkpoint, 256)
    return model, open_pack(side, checkpoint, model)


def read(extent: Extent) -> np.ndarray:
    with extent.path.open("rb") as file:
        file.seek(extent.offset)
        return np.frombuffer(file.read(extent.nbytes), np.uint8)


def test_both_halves_of_every_expert_are_its_bytes(side: Path) -> None:
    model, pack = opened(TRAINED, side)
    assert len(pack.experts) == 6 * 32
    for key in (ExpertKey(0, 0), ExpertKey(3, 17), ExpertKey(5, 31)):
        for matrix, high, low in zip(model.experts[key.layer].experts[key.expert], *pack.experts[key], strict=True):
            original = read(matrix.extent).reshape(-1, matrix.element.block_bytes)
            blocks = np.empty_like(original)
            expand(read(high).reshape(len(original), -1), matrix.element, blocks)
            refine(blocks, read(low).reshape(len(original), -1), matrix.element)
            assert np.array_equal(blocks, original)
    whole = sum(matrix.nbytes for layer in model.experts.values() for three in layer.experts for matrix in three)
    assert whole < side.stat().st_size < 1.01 * whole + 10_000


def test_a_coarse_expert_in_a_slot_becomes_the_original(side: Path) -> None:
    model, pack = opened(TRAINED, side)
    (spec,) = expert_banks(model)
    slab = Slab(5 * spec.stride, huge_pages=False)
    reader = MemoryReader(LocalStorage(direct=False), [TRAINED, side])
    policy = make_eviction("lru", [layer.layer for layer in spec.layers], 32)
    bank = ExpertBank(spec, slab, 5, reader, policy, pack=pack)
    keys = [ExpertKey(2, 9), ExpertKey(4, 0), ExpertKey(5, 31)]

    def contents(key: ExpertKey) -> list[bytes]:
        layer = model.experts[key.layer]
        base = bank.slot(key) * spec.stride
        places = zip(layer.experts[key.expert], spec.offsets(layer), strict=True)
        return [bytes(slab.view(base + offset, matrix.nbytes)) for matrix, offset in places]

    for flight in bank.start(keys, 2, keys, dict.fromkeys(keys, "coarse")):
        bank.land(flight, passing=False)
    for key in keys:
        assert bank.is_coarse(key)
        for found, matrix in zip(contents(key), model.experts[key.layer].experts[key.expert], strict=True):
            original = read(matrix.extent).reshape(-1, matrix.element.block_bytes)
            coarse = np.empty_like(original)
            expand(split(original, matrix.element)[0], matrix.element, coarse)
            assert found == coarse.tobytes() != original.tobytes()
    for flight in bank.start(keys[:2], 2, keys, dict.fromkeys(keys, "rest")):
        bank.land(flight, passing=False)
    for key in keys[:2]:
        assert not bank.is_coarse(key)
        originals = [read(matrix.extent).tobytes() for matrix in model.experts[key.layer].experts[key.expert]]
        assert contents(key) == originals
    assert bank.is_coarse(keys[2]) and len(bank._free) == 2, "where the rest had landed is free again"
    slab.close()


def decode(**options: Any) -> tuple[tuple[int, ...], float, Any]:
    with offload.load(TRAINED, ctx=256, **options) as engine:
        answer = engine.generate(PROMPT, max_tokens=40, temperature=0, ignore_eos=True)
        likelihood = float(engine.log_likelihood(answer.tokens, one_by_one=True).mean())
        return answer.tokens, likelihood, engine.statistics().experts


def test_light_experts_are_coarse_when_they_are_missing(side: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, likelihood, _ = decode()
    monkeypatch.setattr("offload.opening.make_plan", few_slots)
    monkeypatch.setattr("offload.host_place.CAN_DISCARD", False)
    same, _, use = decode(expert_pack=side, coarse_experts_below=1e-9)
    assert same == exact and use.coarse == 0
    _, rough, use = decode(expert_pack=side, coarse_experts_below=0.3)
    assert use.coarse > 0 and 0 < abs(rough - likelihood) < 0.5


def test_a_prompt_computes_whole_experts_even_where_coarse_ones_are(
    side: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with offload.load(TRAINED, ctx=256) as engine:
        expected = engine.logits(PROMPT)
    monkeypatch.setattr("offload.opening.make_plan", few_slots)
    monkeypatch.setattr("offload.host_place.CAN_DISCARD", False)
    with offload.load(TRAINED, ctx=256, expert_pack=side, coarse_experts_below=1.0) as engine:
        engine.generate(PROMPT[:4], max_tokens=30, temperature=0, ignore_eos=True)
        bank = next(iter(engine._runner.scheduler._experts._banks.values()))
        assert len(bank._coarse) > 10
        assert np.array_equal(engine.logits(PROMPT), expected)


@pytest.mark.parametrize("element", ["Q4_0", "Q4_K", "Q6_K"])
def test_other_types_are_packed_alike(element: str, tmp_path: Path) -> None:
    path = gguf_checkpoint("olmoe", tmp_path, element, hidden_size=256, intermediate_size=256, num_experts=4)
    side = tmp_path / "side.gguf"
    write_pack(path, side)
    model, pack = opened(path, side)
    matrix = model.experts[1].experts[3].down
    original = read(matrix.extent).reshape(-1, matrix.element.block_bytes)
    high, low = split(original, matrix.element)
    assert read(pack.experts[ExpertKey(1, 3)].high[2]).tobytes() == high.tobytes()
    assert read(pack.experts[ExpertKey(1, 3)].low[2]).tobytes() == low.tobytes()


def test_what_cannot_be_packed_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="F32: its bits cannot be split"):
        write_pack(tiny_checkpoint("olmoe", tmp_path / "moe"), tmp_path / "side.gguf")
    with pytest.raises(UsageError, match="no experts"):
        write_pack(tiny_checkpoint("llama", tmp_path / "dense"), tmp_path / "side.gguf")
    precious = tmp_path / "precious.gguf"
    precious.write_bytes(b"precious")
    with pytest.raises(UsageError, match="already"):
        write_pack(TRAINED, precious)
    assert precious.read_bytes() == b"precious"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offload.writing.os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device; nothing was written: choose another"):
        write_pack(TRAINED, tmp_path / "side.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_differs_in_its_experts_only_is_another_one(side: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copy(TRAINED, tmp_path / "twin.gguf"))
    extent = open_checkpoint(twin).tensors["blk.3.ffn_up_exps.weight"].extent
    data = twin.read_bytes()
    experts = data[extent.offset : extent.end]
    twin.write_bytes(
        data[: extent.offset] + experts[len(experts) // 2 :] + experts[: len(experts) // 2] + data[extent.end :]
    )
    assert open_checkpoint(twin).fingerprint == open_checkpoint(TRAINED).fingerprint
    with pytest.raises(CheckpointError, match="of another model"):
        offload.load(twin, ctx=64, expert_pack=side)


def test_a_side_file_may_be_named_from_where_one_stands(
    side: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(side.parent)
    monkeypatch.setattr("offload.opening.make_plan", few_slots)
    monkeypatch.setattr("offload.host_place.CAN_DISCARD", False)
    _, _, use = decode(expert_pack=side.name, coarse_experts_below=0.3)
    assert use.coarse > 0


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("offload.packing.shutil.disk_usage", lambda place: usage._replace(free=1 << 20))
    with pytest.raises(StorageError, match=r"needs 9\.\d+ MiB, .* has 1\.00 MiB free; make room"):
        write_pack(TRAINED, tmp_path / "side.gguf")
    with pytest.raises(StorageError, match="no such folder"):
        write_pack(TRAINED, tmp_path / "none" / "side.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_changes_under_the_packing_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copy(TRAINED, tmp_path / "model.gguf"))
    extent = open_checkpoint(model).tensors["blk.0.ffn_up_exps.weight"].extent

    def change(done: int, total: int) -> None:
        with model.open("r+b") as file:
            file.seek(extent.offset)
            file.write(bytes(extent.nbytes))

    with pytest.raises(StorageError, match="it changed while it was read"):
        write_pack(model, tmp_path / "side.gguf", change)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_where_no_slot_is_left_for_the_rest_of_an_expert_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank of one layer with as many slots as a token uses: all are coarse, and a prompt needs all of them in full."""
    model = gguf_checkpoint("olmoe", tmp_path, "Q8_0", num_hidden_layers=1)
    side, prompts = tmp_path / "side.gguf", [[(7 * n + m) % 250 for n in range(12)] for m in range(8)]
    write_pack(model, side)
    with offload.load(model, ctx=64) as engine:
        expected = [engine.logits(prompt) for prompt in prompts]
    monkeypatch.setattr("offload.host_place.CAN_DISCARD", False)
    with offload.load(
        model, ctx=64, ram="minimum", expert_pack=side, coarse_experts_below=1.0, prefetch="off"
    ) as engine:
        (bank,) = engine._runner.scheduler._experts._banks.values()
        anew: list[ExpertKey] = []
        forget = bank.forget
        monkeypatch.setattr(
            bank, "forget", lambda key: (anew.append(key) if bank.is_coarse(key) else None, forget(key))
        )
        for prompt, logits in zip(prompts, expected, strict=True):
            engine.generate(prompt, max_tokens=6, temperature=0, ignore_eos=True)
            assert np.array_equal(engine.logits(prompt), logits)
        assert bank.num_slots == bank.spec.least_slots and anew


def test_a_side_file_of_another_model_is_refused(side: Path, tmp_path: Path) -> None:
    other = gguf_checkpoint("olmoe", tmp_path, "Q8_0")
    for path, words in ((other, "not a side file"), (side, "of another model"), (TRAINED, "not a side file")):
        with pytest.raises(CheckpointError, match=words):
            offload.load(other, ctx=64, expert_pack=path)
    with pytest.raises(CheckpointError, match="no such file; `offload pack` makes"):
        offload.load(other, ctx=64, expert_pack=tmp_path / "missing.gguf")
    cut = Path(shutil.copy(side, tmp_path / "cut.gguf"))
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size // 2)
    with pytest.raises(OffloadError, match=r"cut\.gguf"):
        offload.load(TRAINED, ctx=64, expert_pack=cut)
    with pytest.raises(UsageError, match="write one with `offload pack`"):
        offload.load(TRAINED, coarse_experts_below=0.1)
