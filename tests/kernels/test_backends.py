"""Both backends driven by hand, piece by piece: streamed weights come to new memory each time and are spoiled after use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.running import PlainRunner, read_vector, relative_error

from offload.blocks import BlockKey
from offload.config import FEW_TOKENS, MICRO_BATCH_TOKENS
from offload.elements import KVTypes, kv_types
from offload.errors import BackendError, Cancelled
from offload.kernels.batch import MicroBatch
from offload.kernels.ggml.backend import GgmlBackend
from offload.kernels.ggml.cache import bucket_nbytes, buckets_of, cache_nbytes, table_keys
from offload.kernels.ggml.library import load_library
from offload.kernels.ggml.workspace import Workspace
from offload.kernels.torch.backend import TorchBackend, free_device_bytes
from offload.models.base import Model
from offload.models.checkpoint import open_checkpoint
from offload.models.parts import head_parts, movable_parts
from offload.models.registry import build_model
from offload.tiers.base import CancelToken
from offload.tiers.vram import DeviceTier
from offload.units import MIB, PAGE, align_up

Array = np.ndarray[Any, Any]
CTX, LAYERS, VOCAB = 300, 3, 330  # two buckets of cache; a head of 128, 128, 64 and 10 rows
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
TOKENS = [int(token) for token in np.random.default_rng(2).integers(0, VOCAB, CTX)]
PROMPT = (MicroBatch(0, 100), MicroBatch(100, 154, (153, 0, 7)))
STEPS = tuple(MicroBatch(position, 1, (0,)) for position in range(254, 259))  # across the end of a bucket


def aligned(nbytes: int) -> Array:
    memory = np.zeros(nbytes + PAGE, np.uint8)
    start = align_up(memory.ctypes.data) - memory.ctypes.data
    return memory[start : start + nbytes]


class Driven:
    """A backend with all of its inputs. Streamed blocks arrive before their piece, all others are in place."""

    def __init__(self, model: Model, backend: Any) -> None:
        self.model, self.backend, self.plain = model, backend, PlainRunner(model, CTX)
        for name, vector in model.vectors.items():
            backend.place_vector(name, read_vector(vector).numpy())
        layers = {name: stage.layer for stage in model.stages for name in stage.matrices}
        self.blocks: dict[BlockKey, Array] = {}
        for name, parts in model.parts.items():
            for number, part in enumerate(parts):
                with part.extent.path.open("rb") as file:
                    file.seek(part.extent.offset)
                    raw = np.fromfile(file, np.uint8, part.nbytes)
                self.blocks[BlockKey("weight", layers[name], name, number)] = raw
        self.kept: list[Array] = []
        self.stream(())

    def room(self, nbytes: int) -> tuple[Array, int]:
        """Memory for weights, and its address."""
        memory = aligned(nbytes)
        return memory, memory.ctypes.data

    def stream(self, streamed: Iterable[BlockKey], *, gap: int = 0) -> None:
        """Puts all other blocks in new places, with a gap between the parts of a matrix, and spoils the old ones."""
        for memory in self.kept:
            memory[:] = 0xFF
        for name in self.model.matrices:
            keys = [key for key in self.blocks if key.name == name]
            memory, address = self.room(sum(self.blocks[key].nbytes + gap for key in keys))
            self.kept.append(memory)
            start = 0
            for key in keys:
                stop = start + self.blocks[key].nbytes
                memory[start:stop] = 0xFF if key in streamed else self.blocks[key]
                self.backend.place(key, address + start)
                start = stop + gap
        self.pieces = self.backend.schedule(frozenset(streamed))

    def begin(self, *batches: MicroBatch) -> None:
        ids = [token for batch in batches for token in TOKENS[batch.start : batch.kv_length]]
        self.backend.begin(batches, (self.plain.embedding[ids] * self.model.config.embedding_scale).numpy())

    def forward(self, *batches: MicroBatch) -> Array:
        """Logits of the last of the batches that one pass computes."""
        self.begin(*batches)
        for number, piece in enumerate(self.pieces):
            arrived = []
            for key in piece.streamed:
                memory, address = self.room(self.blocks[key].nbytes)
                memory[:] = self.blocks[key]
                self.backend.place(key, address)
                arrived.append(memory)
            self.kept += arrived
            for batch in range(len(batches)):
                self.backend.run(number, batch)
            for key, memory in zip(piece.streamed, arrived, strict=True):
                if key.kind == "kv":
                    self.blocks[key] = memory.copy()
                memory[:] = 0xFF
        logits: Array = self.backend.logits(len(batches) - 1) if batches[-1].outputs else np.empty((0, VOCAB))
        return logits


class Host(Driven):
    def __init__(self, model: Model, types: KVTypes) -> None:
        self.cache = aligned(cache_nbytes(model, CTX, types))
        backend = GgmlBackend(model, CTX, threads=2, kv_types=types)
        backend.place_cache(self.cache.ctypes.data)
        super().__init__(model, backend)


class Device(Driven):
    host_kv: frozenset[int] = frozenset()

    def __init__(self, model: Model, types: KVTypes) -> None:
        whole = replace(model, parts={name: (matrix,) for name, matrix in model.matrices.items()})
        self.tier = DeviceTier("cpu", 48 * MIB)
        backend = TorchBackend(whole, CTX, self.tier, threads=2, kv_types=types, host_kv=self.host_kv)
        super().__init__(whole, backend)

    def room(self, nbytes: int) -> tuple[Array, int]:
        offset = self.tier.allocate(nbytes)
        return self.tier.view(offset, nbytes).numpy(), offset


class Mixed(Device):
    """Its last layers attend in host memory."""

    host_kv = frozenset({1, 2})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Models by family; their matrices move in parts of 64 rows."""
    made: dict[str, Model] = {}

    def model(family: str) -> Model:
        if family not in made:
            folder = tiny_checkpoint(family, tmp_path_factory.mktemp(family), **SIZES)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("offload.models.parts.PART_BYTES", 1)
                patch.setattr("offload.models.assembly.movable_parts", lambda matrix: movable_parts(matrix, 1))
                patch.setattr(
                    "offload.models.assembly.head_parts", lambda head: head_parts(head, 128 * head.row_nbytes)
                )
                made[family] = build_model(open_checkpoint(folder), CTX)
        return made[family]

    return model


Make = Callable[..., Any]
F32 = kv_types("f32")


@pytest.fixture
def make(model: Callable[[str], Model]) -> Iterator[Make]:
    opened: list[Driven] = []

    def make(kind: type[Host] | type[Device], family: str = "llama", types: KVTypes = F32) -> Driven:
        opened.append(kind(model(family), types))
        return opened[-1]

    yield make
    for driven in opened:
        driven.backend.close()
        driven.backend.close()  # nothing is left to free


def stream_tables(driven: Host, layers: set[int]) -> None:
    """From now on the cache of these layers arrives head by head, and is empty."""
    driven.backend.stream_tables(layers)
    driven.backend.place_cache(driven.cache.ctypes.data)
    nbytes = buckets_of(CTX) * bucket_nbytes(driven.model, kv_types("f16"))
    for layer in layers:
        keys = table_keys(layer, driven.model.config.num_kv_heads)
        driven.blocks |= {key: np.zeros(nbytes, np.uint8) for key in keys}


both = pytest.mark.parametrize("kind", [Host, Device])
every = pytest.mark.parametrize("kind", [Host, Device, Mixed])


# f16 is off by 2^-11 of a number at most; bf16 by 8 times that, q8_0 and q4_0 by 8 and 128 times, of the largest of a block
TOLERANCES = {"f32": 1e-4, "f16": 2e-3, "bf16": 16e-3, "q8_0": 16e-3, "q4_0": 0.25}


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_both_backends_give_the_logits_of_the_plainest_engine(make: Make, family: str, kv_type: str) -> None:
    seen, tolerance = [], TOLERANCES[kv_type]
    for kind in (Host, Device):
        driven = make(kind, family, kv_types(kv_type))
        driven.stream(list(driven.blocks)[::2])
        seen.append(torch.from_numpy(np.concatenate([driven.forward(*PROMPT), *map(driven.forward, STEPS)])))
    expected = driven.plain.logits(TOKENS[:259])[[253, 100, 107, *range(254, 259)]]
    for ours, theirs in ((seen[0], expected), (seen[1], expected), seen):
        assert relative_error(ours, theirs) < tolerance


@both
def test_no_bit_depends_on_which_blocks_are_streamed_or_where_they_lie(make: Make, kind: type[Driven]) -> None:
    driven = make(kind)
    keys = list(driven.blocks)
    passes = (PROMPT, STEPS[:1], STEPS[1:2])
    expected = [driven.forward(*batches) for batches in passes]
    assert len(driven.pieces) == 1 and (kind is Device or len(keys) > 2 * len(driven.model.matrices))
    for streamed in (keys, keys[::3], keys[1:2], keys[-1:], []):
        driven.stream(streamed, gap=PAGE)
        assert [key for piece in driven.pieces for key in piece.streamed] == streamed
        assert sum(piece.pinned for piece in driven.pieces) == len(keys) - len(streamed)
        assert all(np.array_equal(driven.forward(*passes[i]), expected[i]) for i in range(len(passes)))


@both
def test_micro_batches_of_one_pass_are_what_they_are_one_after_the_other(make: Make, kind: type[Driven]) -> None:
    driven = make(kind)
    batches = (MicroBatch(0, 40), MicroBatch(40, 20), MicroBatch(60, 20), MicroBatch(80, 2, (1, 0)))
    *_, apart = map(driven.forward, batches)
    driven.stream(driven.blocks)
    assert np.array_equal(driven.forward(*batches), apart)


@both
def test_each_micro_batch_of_a_pass_has_its_own_logits(make: Make, kind: type[Driven]) -> None:
    driven = make(kind)
    first, second, silent = MicroBatch(0, 40, (3, 39)), MicroBatch(40, 20, (19,)), MicroBatch(60, 5)
    expected = [driven.forward(batch) for batch in (first, second, silent)]
    driven.forward(first, second, silent)
    for number, logits in enumerate(expected):
        assert np.array_equal(driven.backend.logits(number), logits)
        assert driven.backend.logits(number).shape == logits.shape


@both
def test_a_pass_that_is_cancelled_in_the_middle_can_be_begun_again(make: Make, kind: type[Driven]) -> None:
    driven, batches = make(kind), (MicroBatch(0, 40), MicroBatch(40, 3, (2,)))
    *_, expected = map(driven.forward, batches)
    driven.stream([key for key in driven.blocks if key.layer == 1])
    for batch in batches:
        driven.backend.set_cancel(token := CancelToken())
        driven.begin(batch)
        driven.backend.run(0, 0)
        token.cancel()
        with pytest.raises(Cancelled):
            driven.backend.run(1, 0)
        driven.backend.set_cancel(None)
        logits = driven.forward(batch)
    assert np.array_equal(logits, expected)


@pytest.mark.parametrize("key", TOLERANCES)
@pytest.mark.parametrize("value", TOLERANCES)
def test_a_smaller_cache_costs_no_more_than_its_types_round(make: Make, key: str, value: str) -> None:
    logits = []
    for types in (F32, kv_types(key, value)):
        driven = make(Host, types=types)
        driven.stream(list(driven.blocks)[::2])
        logits.append(torch.from_numpy(np.concatenate([driven.forward(*PROMPT), *map(driven.forward, STEPS)])))
    assert relative_error(logits[1], logits[0]) < max(TOLERANCES[key], TOLERANCES[value])


# of keys and values, and what a row takes with 32 features of each: 34 + 18 is no multiple of the 16 that whole pages need
ROWS = (("f16", "f16", 128), ("f32", "f32", 256), ("bf16", "f32", 192), ("q8_0", "q8_0", 80), ("q8_0", "q4_0", 64),
        ("q4_0", "f32", 160))  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "key", "value", "nbytes"),
    [(Host, *row) for row in ROWS] + [(kind, *row) for row in ROWS if "q" not in row[0] for kind in (Device, Mixed)],
)
def test_what_the_cache_holds_goes_to_another_backend_of_the_kind(
    make: Make, kind: type[Driven], key: str, value: str, nbytes: int
) -> None:
    types = kv_types(key, value)
    driven, other = make(kind, types=types), make(Device if kind is Mixed else kind, types=types)
    *_, expected = map(driven.forward, (MicroBatch(0, 40), step := MicroBatch(40, 1, (0,))))
    for layer in range(LAYERS):
        for start, stop in ((0, 25), (25, 40)):
            rows = driven.backend.cached_rows(layer, start, stop)
            assert rows.shape == (2, stop - start, nbytes)  # heads, positions
            other.backend.restore_rows(layer, start, rows)
    driven.forward(MicroBatch(0, 40))  # what was given is a copy
    assert np.array_equal(other.forward(step), expected)


# ---- ggml


@pytest.mark.parametrize("weights", [0, 2], ids=["weights stay", "weights arrive"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "phi3"])
def test_tables_that_arrive_head_by_head_give_the_bits_of_a_cache_that_stays(
    make: Make, family: str, weights: int
) -> None:
    driven, plain = make(Host, family, kv_types("f16")), make(Host, family, kv_types("f16"))
    passes = (PROMPT, *((step,) for step in STEPS))
    expected = [plain.forward(*batches) for batches in passes]
    for layers in ({1}, {0, 2}, {0, 1, 2}):
        stream_tables(driven, layers)
        tables = [key for key in driven.blocks if key.kind == "kv" and key.layer in layers]
        matrices = [key for key in driven.blocks if key.kind == "weight"][:: weights or 10**9]
        driven.stream([*tables, *matrices])
        assert [key for piece in driven.pieces for key in piece.streamed if key.kind == "kv"] == sorted(tables)
        assert all(np.array_equal(driven.forward(*passes[i]), expected[i]) for i in range(len(passes)))


def test_nothing_is_computed_past_the_last_attention_for_a_batch_without_outputs(make: Make) -> None:
    driven = make(Host)
    driven.stream(driven.blocks)
    driven.forward(MicroBatch(0, 19))
    assert driven.backend.run(len(driven.pieces) - 1, 0) == 0.0
    assert driven.backend.logits(0).shape == (0, VOCAB)


def test_the_memory_of_prompts_is_apart_and_given_back_without_a_trace(make: Make) -> None:
    driven, other = make(Host), make(Host)
    backend, sizes = driven.backend, []
    batches = MicroBatch(0, FEW_TOKENS), MicroBatch(FEW_TOKENS, FEW_TOKENS + 1), MicroBatch(65, 4, (3,))
    for batch in batches:
        expected, logits = other.forward(batch), driven.forward(batch)
        sizes.append((backend._few.nbytes, backend._prompts[0].nbytes))
        backend.release_prompt()
        assert backend._prompts[0].nbytes == 0
    assert np.array_equal(logits, expected)
    assert sizes[0] == sizes[2] == (sizes[1][0], 0) and min(sizes[1]) > 0
    backend.set_cancel(token := CancelToken())
    backend.release_prompt()
    driven.begin(batches[0])
    token.cancel()
    with pytest.raises(Cancelled):  # ggml's new backend looks at the flag as the old one did
        backend.run(0, 0)


def test_graphs_are_built_once_for_each_shape_and_again_after_a_new_schedule(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven, built, allocate = make(Host), [], Workspace.allocate
    driven.backend.reserve()
    monkeypatch.setattr(Workspace, "allocate", lambda *given: (built.append(given), allocate(*given)))
    counts = []
    for batch in (*STEPS, MicroBatch(259, 1), MicroBatch(260, 2, (0,)), MicroBatch(262, 1, (0,))):
        driven.forward(batch)
        counts.append(len(built))
    assert counts == [1, 1, 2, 2, 2, 3, 4, 4]  # a step, a new bucket, no outputs, two tokens, again a step
    driven.stream(())
    driven.forward(STEPS[-1])
    assert len(built) == 5


def test_what_was_reserved_is_enough_for_every_later_graph(make: Make) -> None:
    driven = make(Host)
    driven.stream(driven.blocks)
    needs = driven.backend.reserve()
    workspaces = driven.backend._few, driven.backend._prompts[0]
    few, prompt = (workspace.nbytes for workspace in workspaces)
    assert needs.few > few > 0 and needs.prompt > MIB and needs.micro_batch == prompt > few
    late = (MicroBatch(CTX - tokens, tokens, (0,)) for tokens in (MICRO_BATCH_TOKENS, FEW_TOKENS, 1))
    assert all(np.isfinite(driven.forward(batch)).all() for batch in late)
    assert [workspace.nbytes for workspace in workspaces] == [few, prompt]


@pytest.mark.parametrize(("key", "value", "nbytes"), ROWS)
def test_the_cache_lies_where_it_was_put_table_by_table_and_can_move(
    make: Make, key: str, value: str, nbytes: int
) -> None:
    types = kv_types(key, value)
    driven = make(Host, types=types)
    bucket = 256 * nbytes
    assert bucket_nbytes(driven.model, types) == bucket and bucket % PAGE == 0
    assert cache_nbytes(driven.model, 256, types) == LAYERS * 2 * bucket  # heads
    assert cache_nbytes(driven.model, 257, types) == driven.cache.nbytes == LAYERS * 2 * 2 * bucket
    driven.forward(MicroBatch(0, 40))
    rows = driven.cache.reshape(LAYERS * 2, 2 * 256, bucket // 256)
    assert rows[:, :40].any(-1).all() and not rows[:, 40:].any()
    expected = driven.forward(step := MicroBatch(40, 1, (0,)))
    moved = aligned(driven.cache.nbytes)
    moved[:], driven.cache[:] = driven.cache, 0xFF
    driven.backend.place_cache(moved.ctypes.data)
    driven.stream(())  # graphs that are cached already look where the cache was
    assert np.array_equal(driven.forward(step), expected)


def test_a_kernel_that_fails_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    driven = make(Host)
    driven.begin(STEPS[0])
    monkeypatch.setattr(load_library(), "ggml_backend_graph_compute", lambda backend, graph: -1)
    with pytest.raises(BackendError, match=r"^ggml: piece 0 of a pass failed with status -1$"):
        driven.backend.run(0, 0)


# ---- torch


def test_a_layer_that_attends_in_host_memory_stands_alone_and_changes_no_bit(make: Make) -> None:
    device, mixed = make(Device, "qwen2"), make(Mixed, "qwen2")
    assert [piece.name.split(" .. ")[0] for piece in mixed.pieces] == [
        "blk.0.attention", "blk.1.attention", "blk.1.feed_forward", "blk.2.attention", "blk.2.feed_forward"
    ]  # fmt: skip
    passes = (PROMPT, *((step,) for step in STEPS))
    for streamed in ([], [key for key in mixed.blocks if key.layer == 1]):
        mixed.stream(streamed)
        assert all(np.array_equal(device.forward(*batches), mixed.forward(*batches)) for batches in passes)


def test_torch_tells_what_it_takes_beside_the_matrices(make: Make) -> None:
    driven = make(Device, "qwen2", types := kv_types("f16", "f32"))
    needs = TorchBackend.device_nbytes(driven.model, CTX, types, MICRO_BATCH_TOKENS, "cpu")
    assert needs["kv"] == driven.backend._cache.nbytes == LAYERS * CTX * 2 * 32 * (2 + 4)
    assert needs["vectors"] == sum(vector.nbytes for vector in driven.backend._vectors.values()) > 0


def test_a_tenth_of_a_devices_free_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.kernels.torch.backend.available_memory", lambda: 1001)
    assert free_device_bytes("cpu") == 500
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert free_device_bytes("cuda:3") == 900
