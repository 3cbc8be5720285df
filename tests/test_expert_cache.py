"""Experts that come and go: whatever is asked for is computed once, from its own bytes, however few slots there are."""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.blocks import ExpertKey, Extent
from offload.elements import BY_NAME
from offload.errors import Cancelled, StorageError
from offload.expert_bank import BankSpec, expert_banks
from offload.expert_cache import ExpertCache
from offload.expert_slots import ExpertBank
from offload.models.base import ExpertLayer, ExpertMatrices
from offload.models.checkpoint.base import TensorInfo
from offload.prefetch.eviction import Eviction, LeastRecentlyUsed
from offload.prefetch.governor import Governor
from offload.prefetch.policies import EVICTION, make_eviction
from offload.telemetry import Telemetry
from offload.tiers.base import CancelToken, Group, TransferHandle
from offload.tiers.memory import FakeStorage, MemoryReader
from offload.tiers.ram import Slab

FILE = Path("/experts")
LAYERS, EXPERTS, USED = 3, 12, 2
SHAPES = {"gate": (33, 64), "up": (33, 64), "down": (64, 33)}  # 8,448 bytes each: no multiple of a page
CONTENT = np.random.default_rng(0).bytes(3 * LAYERS * EXPERTS * 33 * 64 * 4 + 777)


def make_layers() -> list[ExpertLayer]:
    """All gates of a layer, then all ups, then all downs, as a GGUF has them, from an odd offset on."""
    offset, layers = 777, []
    for layer in range(LAYERS):
        roles = []
        for role, shape in SHAPES.items():
            nbytes = shape[0] * shape[1] * 4
            members = []
            for expert in range(EXPERTS):
                extent = Extent(path=FILE, offset=offset, nbytes=nbytes)
                members.append(
                    TensorInfo(name=f"{layer}.{role}.{expert}", element=BY_NAME["F32"], shape=shape, extent=extent)
                )
                offset += nbytes
            roles.append(members)
        experts = tuple(ExpertMatrices(*three) for three in zip(*roles, strict=True))
        layers.append(ExpertLayer(layer=layer, num_used=USED, activation="silu", experts=experts))
    return layers


class Kernels:
    """A backend that checks, and notes in order, what it is asked to compute."""

    def __init__(self, spec: BankSpec, slab: Slab) -> None:
        self.spec, self.slab = spec, slab
        self.computed: list[tuple[int, ExpertKey]] = []
        self.guess: dict[int, list[int]] = {}

    def foreseen(self, batch: int, layer: int, ahead: int) -> np.ndarray:
        return np.array([self.guess.get(layer, [])], np.int32) if self.guess.get(layer) else np.empty((0, 2), np.int32)

    def compute_experts(self, batch: int, layer: int, slots: Mapping[int, int]) -> float:
        experts = next(one for one in self.spec.layers if one.layer == layer)
        for expert, slot in slots.items():
            for matrix, offset in zip(experts.experts[expert], self.spec.offsets(experts), strict=True):
                start = self.slab.address + slot * self.spec.stride + offset
                assert ctypes.string_at(start, matrix.nbytes) == CONTENT[matrix.extent.offset : matrix.extent.end]
            self.computed.append((batch, ExpertKey(layer, expert)))
        return 0.0


class HeldReader:
    """Reads when told to: demands in the order of the requests, then what is read in the background."""

    def __init__(self) -> None:
        self.inner = MemoryReader(FakeStorage({FILE: CONTENT}), [FILE])
        self.requests: deque[tuple[Extent, memoryview, TransferHandle]] = deque()
        self.background: deque[tuple[Extent, memoryview, TransferHandle]] = deque()
        self.fails = self.refuses = False
        self.submissions = 0

    def read_groups(self, groups: Sequence[Group], *, background: bool = False) -> list[TransferHandle]:
        self.submissions += 1
        if self.refuses:
            raise StorageError("the file has shrunk")
        handles = []
        for group in groups:
            handle = TransferHandle(pieces=len(group), nbytes=sum(extent.window_nbytes for extent, _ in group))
            (self.background if background else self.requests).extend((*request, handle) for request in group)
            handles.append(handle)
        return handles

    def promote(self, handles: Sequence[TransferHandle]) -> None:
        chosen = self._take(handles)
        self.requests.extendleft(reversed(chosen))

    def drop(self, handles: Sequence[TransferHandle]) -> None:
        for _, _, handle in self._take(handles):
            handle.fail(Cancelled("dropped"))

    def _take(self, handles: Sequence[TransferHandle]) -> list[tuple[Extent, memoryview, TransferHandle]]:
        chosen = [entry for entry in self.background if entry[2] in handles]
        self.background = deque(entry for entry in self.background if entry[2] not in handles)
        return chosen

    def release(self, count: int) -> None:
        for _ in range(count):
            extent, destination, handle = (self.requests or self.background).popleft()
            if self.fails:
                handle.fail(StorageError("the disk failed"))
            else:
                self.inner.read_extent(extent, destination)
                handle.complete(extent.window_nbytes)

    def cancel_pending(self) -> int:
        for _, _, handle in (*self.requests, *self.background):
            handle.fail(Cancelled("dropped"))
        self.requests.clear()
        self.background.clear()
        return 0

    def drain(self) -> None:
        assert not self.requests and not self.background


class Bench:
    """A cache over a bank of so many slots."""

    def __init__(
        self,
        num_slots: int,
        reader: object | None = None,
        *,
        reserve: int = 0,
        policy: Eviction | None = None,
        spare: int = 0,
    ) -> None:
        layers = make_layers()
        model = type("Model", (), {"experts": {layer.layer: layer for layer in layers}})
        (self.spec,) = expert_banks(model)  # type: ignore[arg-type]
        self.slab = Slab((num_slots + spare) * self.spec.stride, huge_pages=False)
        self.kernels = Kernels(self.spec, self.slab)
        self.reader = reader or MemoryReader(FakeStorage({FILE: CONTENT}), [FILE])
        self.policy = policy or LeastRecentlyUsed(range(LAYERS), EXPERTS)
        self.bank = ExpertBank(self.spec, self.slab, num_slots, self.reader, self.policy, reserve)  # type: ignore[arg-type]
        self.telemetry = Telemetry()
        banks = dict.fromkeys(range(LAYERS), self.bank)
        governor = Governor(fixed=reserve > 0)
        self.cache = ExpertCache(banks, self.kernels, self.reader, self.telemetry, governor)  # type: ignore[arg-type]

    def run(self, layer: int, *choices: Sequence[Sequence[int]]) -> None:
        """One layer of a pass whose micro-batches made these choices, and what was computed for it."""
        self.kernels.computed = []
        self.cache.demand(layer, [np.array(choice, np.int32).reshape(len(choice), -1) for choice in choices])
        self.cache.compute(layer, None)
        wanted = {(batch, ExpertKey(layer, e)) for batch, choice in enumerate(choices) for row in choice for e in row}
        assert Counter(self.kernels.computed) == Counter(wanted)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(6)
    yield made
    made.slab.close()


def test_a_slot_has_room_for_every_expert_and_layers_agree_on_where_it_lies() -> None:
    bench = Bench(1)
    for layer in bench.spec.layers:
        offsets = bench.spec.offsets(layer)
        for matrices in layer.experts:
            for matrix, start, window, offset in zip(
                matrices, bench.spec.starts, bench.spec.windows, offsets, strict=True
            ):
                assert matrix.extent.window_nbytes <= window
                assert start <= offset and offset + matrix.nbytes <= start + window
    bench.slab.close()


choices = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=USED, max_size=USED, unique=True), min_size=1, max_size=9
)
passes = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.lists(choices, min_size=1, max_size=3)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(num_slots=st.integers(1, LAYERS * EXPERTS), work=passes)
def test_whatever_is_chosen_is_computed_once_from_its_own_bytes(num_slots: int, work: list) -> None:
    bench = Bench(max(USED, num_slots))
    for layer, batches in work:
        before = bench.reader.statistics().bytes
        missing = {
            e for choice in batches for row in choice for e in row if bench.bank.slot(ExpertKey(layer, e)) is None
        }
        bench.run(layer, *batches)
        experts = bench.spec.layers[layer].experts
        read = sum(matrix.extent.window_nbytes for e in missing for matrix in experts[e])
        assert bench.reader.statistics().bytes - before == read, "each expert is read once, and only if it was missing"
    bench.slab.close()


def test_what_is_there_is_computed_while_the_rest_is_on_its_way() -> None:
    reader = HeldReader()
    bench = Bench(6, reader)
    bench.cache.demand(0, [np.array([[1, 2]], np.int32)])
    assert (len(reader.requests), reader.submissions) == (6, 1), "all that is missing is asked for at once"
    reader.release(6)
    bench.cache.compute(0, None)
    bench.kernels.computed = []
    bench.cache.demand(0, [np.array([[2, 5]], np.int32)])
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        bench.cache.compute(0, token)
    assert bench.kernels.computed == [(0, ExpertKey(0, 2))]
    bench.cache.restart()
    assert bench.bank.slot(ExpertKey(0, 5)) is None
    bench.slab.close()


def test_a_failed_read_costs_no_slot() -> None:
    reader = HeldReader()
    bench = Bench(2, reader)
    for fails in (True, False):
        reader.fails = fails
        bench.cache.demand(1, [np.array([[3, 4]], np.int32)])
        reader.release(6)
        if fails:
            with pytest.raises(StorageError, match="the disk failed"):
                bench.cache.compute(1, None)
            bench.cache.restart()
    bench.cache.compute(1, None)
    assert {key for _, key in bench.kernels.computed} == {ExpertKey(1, 3), ExpertKey(1, 4)}
    bench.slab.close()


def test_a_refused_read_costs_no_slot() -> None:
    reader = HeldReader()
    bench = Bench(2, reader)
    choice = [np.array([[3, 4]], np.int32)]
    reader.refuses = True
    with pytest.raises(StorageError, match="has shrunk"):
        bench.cache.demand(1, choice)
    bench.cache.restart()
    reader.refuses = False
    bench.cache.demand(1, choice)
    reader.release(6)
    bench.cache.compute(1, None)
    assert len(bench.kernels.computed) == 2
    bench.slab.close()


def test_a_prompt_leaves_what_tokens_use() -> None:
    bench = Bench(16)
    kept = [ExpertKey(0, e) for e in range(8)]
    for expert in range(8):
        bench.run(0, [[expert, (expert + 1) % 8]])
    for layer in (1, 2):
        bench.run(layer, [[e, (e + 1) % EXPERTS] for e in range(EXPERTS)])
    assert all(bench.bank.slot(key) is not None for key in kept)
    bench.slab.close()


def test_a_layer_that_no_token_reaches_needs_nothing(bench: Bench) -> None:
    bench.cache.demand(0, [np.empty((0, USED), np.int32)])
    bench.cache.compute(0, None)
    assert not bench.kernels.computed and bench.telemetry.experts_demanded == 0


def test_hits_and_demands_are_counted(bench: Bench) -> None:
    bench.run(0, [[1, 2]])
    bench.run(0, [[2, 3]])
    assert (bench.telemetry.experts_demanded, bench.telemetry.experts_hit) == (4, 1)


def test_experts_are_filled_in_up_to_the_last_slot(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    bench.cache.fill((ExpertKey(2, e) for e in range(EXPERTS)), lambda done, total: seen.append((done, total)))
    assert [bench.bank.slot(ExpertKey(2, e)) is not None for e in range(EXPERTS)] == [True] * 6 + [False] * 6
    assert seen[-1] == (6, 6)
    before = bench.reader.statistics().bytes
    bench.run(2, [[0, 5]])
    assert bench.reader.statistics().bytes == before


# ---- reading ahead


class Ahead(Bench):
    """A cache with a reserve of two slots, over a reader that is held."""

    def __init__(self, num_slots: int = 8, reserve: int = 2, spare: int = 0) -> None:
        super().__init__(num_slots, HeldReader(), reserve=reserve, spare=spare)

    def step(self, layer: int, chosen: Sequence[int], guess: Sequence[int] = (), *, ahead: int = 0) -> None:
        """One layer of a token, behind which so many reads of the background have time."""
        self.kernels.guess = {layer + 1: list(guess)}
        self.cache.demand(layer, [np.array([chosen], np.int32)])
        self.reader.release(len(self.reader.requests))
        self.cache.compute(layer, None)
        self.reader.release(min(ahead, len(self.reader.background)))

    def there(self, layer: int) -> list[int]:
        self.cache.restart()  # what has arrived is put away
        return [expert for expert in range(EXPERTS) if self.bank.slot(ExpertKey(layer, expert)) is not None]


@pytest.fixture
def ahead() -> Iterator[Ahead]:
    made = Ahead()
    yield made
    made.slab.close()


def test_a_guess_that_was_dropped_half_read_and_is_needed_after_all_is_read_anew(ahead: Ahead) -> None:
    ahead.step(0, [1, 2], guess=[5, 6])
    extent, destination, handle = ahead.reader.background.popleft()  # one piece is in flight, and takes its time
    ahead.step(1, [3, 4])  # the guess was wrong: what has not started of it is dropped
    assert not handle.done() and handle.error is not None
    ahead.step(1, [5, 7])
    assert ahead.kernels.computed[-2:] == [(0, ExpertKey(1, 5)), (0, ExpertKey(1, 7))]
    assert ahead.telemetry.guesses_used == 0
    ahead.reader.inner.read_extent(extent, destination)
    handle.complete(extent.window_nbytes)
    assert ahead.there(1) == [3, 4, 5, 7]
    ahead.step(1, [5, 7])
    assert ahead.telemetry.experts_hit == 2


def test_a_guess_that_failed_is_read_anew(ahead: Ahead) -> None:
    ahead.step(0, [1, 2], guess=[5, 6])
    _, _, handle = ahead.reader.background.popleft()
    handle.fail(StorageError("the disk failed, in the background"))
    ahead.step(1, [5, 6])
    assert {key.expert for _, key in ahead.kernels.computed[-2:]} == {5, 6}


def test_a_right_guess_is_a_hit_and_stays(ahead: Ahead) -> None:
    ahead.step(0, [1, 2], guess=[5, 6], ahead=6)
    assert ahead.telemetry.guesses == 2
    before = ahead.reader.submissions
    ahead.step(1, [5, 6])
    assert ahead.reader.submissions == before, "nothing was left to read"
    assert (ahead.telemetry.experts_hit, ahead.telemetry.guesses_used) == (0, 2), "hits are what tokens left behind"
    assert ahead.there(1) == [5, 6]


def test_a_guess_on_its_way_becomes_a_demand(ahead: Ahead) -> None:
    ahead.step(0, [1, 2], guess=[5, 6], ahead=1)
    ahead.kernels.guess = {}
    ahead.cache.demand(1, [np.array([[5, 7]], np.int32)])
    waiting = [request[0].offset for request in ahead.reader.requests]
    wanted = [matrix.extent.offset for e in (5, 7) for matrix in ahead.spec.layers[1].experts[e]]
    assert waiting == wanted[1:], "what is left of the right guess comes first"
    assert not ahead.reader.background, "what was guessed wrongly is not read any more"
    ahead.reader.release(5)
    ahead.cache.compute(1, None)
    assert {key.expert for _, key in ahead.kernels.computed if key.layer == 1} == {5, 7}
    assert (ahead.telemetry.experts_hit, ahead.telemetry.guesses_used) == (0, 1)


def test_wrong_guesses_take_no_place_from_what_tokens_use(ahead: Ahead) -> None:
    for expert in (0, 2, 4):
        ahead.step(0, [expert, expert + 1])
    kept = ahead.there(0)
    assert len(kept) == 6
    for number in range(4):
        ahead.step(0, [0, 1], guess=[2 * number, 2 * number + 1], ahead=6)
    assert ahead.there(0) == kept
    assert ahead.there(1) == [6, 7], "a later guess takes the place of an earlier one"


def test_the_reserve_is_filled_up_again_when_a_guess_has_become_a_resident(ahead: Ahead) -> None:
    for number in range(4):
        ahead.step(0, [1, 2], guess=[2 * number, 2 * number + 1], ahead=6)
        ahead.step(1, [2 * number, 2 * number + 1])
    assert ahead.telemetry.guesses_used == 8
    assert len(ahead.there(0)) + len(ahead.there(1)) <= 8


def test_what_is_guessed_does_not_go(ahead: Ahead) -> None:
    """The oldest experts are those that the next layer is expected to need: others go."""
    ahead.step(1, [3, 4])
    for expert in (0, 2):
        ahead.step(0, [expert, expert + 1])
    ahead.step(2, [1, 2])
    ahead.step(0, [8, 9], guess=[3, 4])
    assert ahead.there(1) == [3, 4] and 0 not in ahead.there(0)


def test_a_guess_that_cannot_be_read_is_asked_for_again_when_it_is_needed(ahead: Ahead) -> None:
    ahead.reader.fails = False
    ahead.step(0, [1, 2], guess=[5, 6])
    ahead.reader.fails = True
    ahead.reader.release(6)
    ahead.reader.fails = False
    ahead.step(1, [5, 6])
    assert {key.expert for _, key in ahead.kernels.computed if key.layer == 1} == {5, 6}
    ahead.step(0, [1, 2], guess=[7, 8], ahead=6)
    assert ahead.there(1) == [5, 6, 7, 8], "the slots of failed guesses are used again"


def test_a_pass_that_ends_early_takes_its_guesses_along(ahead: Ahead) -> None:
    ahead.step(0, [1, 2], guess=[5, 6], ahead=2)
    ahead.kernels.guess = {2: [1, 2]}
    ahead.cache.demand(1, [np.array([[5, 9]], np.int32)])
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        ahead.cache.compute(1, token)
    ahead.cache.restart()
    assert not ahead.reader.requests and not ahead.reader.background
    for number in range(5):  # no slot was lost
        ahead.step(0, [number, number + 1], guess=[number, number + 1], ahead=6)


def test_prompts_guess_nothing_and_drop_what_was_guessed(ahead: Ahead) -> None:
    ahead.step(0, [1, 2], guess=[5, 6])
    ahead.kernels.guess = {2: [1, 2]}
    ahead.cache.demand(1, [np.array([[7, 8], [8, 9]], np.int32)])
    assert not ahead.reader.background
    ahead.reader.release(len(ahead.reader.requests))
    ahead.cache.compute(1, None)
    assert ahead.telemetry.guesses == 2


steps = st.tuples(
    st.lists(st.integers(0, EXPERTS - 1), min_size=USED, max_size=USED, unique=True),
    st.lists(st.integers(0, EXPERTS - 1), max_size=5, unique=True),
    st.integers(0, 15),
)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.tuples(steps, steps, steps), max_size=8),
    reserve=st.integers(0, 4),
    sizes=st.lists(st.integers(10, 16), min_size=8, max_size=8),
)
def test_whatever_is_guessed_and_lent_the_right_bytes_are_computed(tokens: list, reserve: int, sizes: list) -> None:
    ahead = Ahead(num_slots=10, reserve=reserve, spare=6)
    for token, num_slots in zip(tokens, sizes, strict=False):
        ahead.cache.settle()
        ahead.bank.resize(num_slots)
        for layer, (chosen, guess, idle) in enumerate(token):
            ahead.kernels.computed = []
            ahead.kernels.guess = {layer + 1: guess}
            ahead.cache.demand(layer, [np.array([chosen], np.int32)])
            ahead.reader.release(len(ahead.reader.requests))
            ahead.cache.compute(layer, None)
            assert Counter(ahead.kernels.computed) == Counter((0, ExpertKey(layer, e)) for e in chosen)
            ahead.reader.release(min(idle, len(ahead.reader.background)))
    ahead.cache.restart()
    free, resident, guessed = len(ahead.bank._free), len(ahead.bank._resident), len(ahead.bank._guesses)
    assert free + resident + guessed + len(ahead.bank._idle) == ahead.bank.num_slots, "every slot is somewhere"
    assert guessed + len(ahead.bank._idle) == ahead.bank._reserved <= reserve
    ahead.slab.close()


def test_when_slots_go_what_is_worth_most_stays_wherever_it_lay() -> None:
    bench = Bench(4, spare=4)
    bench.bank.resize(8)
    for expert in range(8):
        bench.run(0, [[expert, (expert + 1) % 8]])
    bench.bank.resize(4)
    assert [expert for expert in range(8) if bench.bank.slot(ExpertKey(0, expert)) is not None] == [0, 5, 6, 7]
    assert all(bench.bank.slot(ExpertKey(0, expert)) < 4 for expert in (0, 5, 6, 7))
    before = bench.reader.statistics().bytes
    bench.run(0, [[5, 6]], [[0, 7]])
    assert bench.reader.statistics().bytes == before, "they are where they were said to be"
    assert not any(bench.slab.view(0, bench.slab.nbytes)[8 * bench.spec.stride :])
    bench.slab.close()


@pytest.mark.parametrize("name", EVICTION)
def test_every_policy_serves_a_cache(name: str) -> None:
    bench = Bench(7, policy=make_eviction(name, range(LAYERS), EXPERTS))
    random = np.random.default_rng(0)
    for _ in range(30):
        for layer in range(LAYERS):
            bench.run(layer, [random.permutation(EXPERTS)[:USED]])
    bench.slab.close()
