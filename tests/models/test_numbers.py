"""Parts of matrices, names, settings and rotations of a model: properties that hold whatever the numbers are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from offload.blocks import Extent
from offload.config import PART_BYTES
from offload.elements import BY_NAME
from offload.errors import CheckpointError
from offload.models.checkpoint.base import TensorInfo
from offload.models.hyperparameters import Settings
from offload.models.naming import LAYER_NAMES, rename
from offload.models.parts import ROW_GROUP, head_parts, movable_parts
from offload.models.rope import huggingface_rope, rope_section

PATH = Path("model")
ROWS = st.one_of(st.integers(1, 9_000), st.integers(1, 150).map(lambda groups: groups * ROW_GROUP))


def matrix(rows: int, columns: int, element: str) -> TensorInfo:
    kind = BY_NAME[element]
    extent = Extent(path=PATH, offset=4096, nbytes=rows * kind.row_bytes(columns))
    return TensorInfo(name="w", element=kind, shape=(rows, columns), extent=extent)


MATRICES = st.builds(
    matrix, ROWS, st.integers(1, 64).map(lambda n: n * 256), st.sampled_from(["F32", "Q8_0", "Q4_K", "F16"])
)
MOST = st.one_of(st.integers(1, 2**26), st.just(PART_BYTES))


def assert_covers(parts: list[TensorInfo], whole: TensorInfo) -> None:
    """The parts are the rows of `whole`, once and in order."""
    place = whole.extent.offset
    for part in parts:
        assert part.extent.offset == place and part.nbytes == part.shape[0] * part.row_nbytes > 0
        assert (part.element, part.shape[1], part.extent.path) == (whole.element, whole.shape[1], whole.extent.path)
        place += part.nbytes
    assert place == whole.extent.offset + whole.nbytes and sum(part.shape[0] for part in parts) == whole.shape[0]


@given(MATRICES, MOST)
def test_movable_parts_are_whole_groups_of_all_rows_once_and_none_is_above_the_limit(
    whole: TensorInfo, most: int
) -> None:
    parts = list(movable_parts(whole, most))
    assert_covers(parts, whole)
    if whole.shape[0] % ROW_GROUP:
        assert parts == [whole]
        return
    rows = [part.shape[0] for part in parts]
    assert all(count % ROW_GROUP == 0 for count in rows) and len({*rows[:-1]}) <= 1 and rows[-1] <= rows[0]
    assert all(part.nbytes <= max(most, ROW_GROUP * part.row_nbytes) for part in parts)
    assert len(parts) == 1 or whole.nbytes > most  # what fits is left whole


@given(MATRICES, MOST)
def test_parts_of_a_head_are_all_its_rows_under_names_that_count(whole: TensorInfo, most: int) -> None:
    named = head_parts(whole, most)
    parts = list(named.values())
    assert_covers(parts, whole)
    assert list(named) == (["output.weight"] if len(parts) == 1 else [f"output.weight[{i}]" for i in range(len(parts))])
    assert all(part.nbytes <= max(most, ROW_GROUP * part.row_nbytes) for part in parts)
    assert all(part.shape[0] % ROW_GROUP == 0 for part in parts[:-1])
    rest = whole.shape[0] % ROW_GROUP  # stands alone, lest it keep the others from moving
    if rest and whole.shape[0] > ROW_GROUP and whole.nbytes > min(most, PART_BYTES):
        assert parts[-1].shape[0] == rest


@given(st.sampled_from(sorted(LAYER_NAMES)), st.integers(0, 10**6), st.sampled_from(["weight", "bias"]),
       st.sampled_from(["", "model.", "model.language_model.", "language_model.model."]))  # fmt: skip
def test_a_tensor_of_a_layer_keeps_its_number_and_its_kind(module: str, layer: int, kind: str, prefix: str) -> None:
    assert rename(f"{prefix}layers.{layer}.{module}.{kind}") == f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"
    assert rename(f"{prefix}{module}.{kind}") == f"{prefix}{module}.{kind}"  # belongs to no layer
    assert rename(f"layers.{layer}.{module}.{kind}", {module: "own"}) == f"blk.{layer}.own.{kind}"


NAMES = st.from_regex(r"(model\.)?(layers\.[0-9]{1,3}\.)?(embed_tokens|norm|lm_head|x)\.(weight|bias)?")


@given(st.one_of(st.text(), NAMES))
def test_a_name_is_renamed_once_and_an_unknown_one_never(name: str) -> None:
    renamed = rename(name)
    assert rename(renamed) == renamed
    assert renamed == name or renamed.split(".")[0] in ("blk", "token_embd", "output_norm", "output")


INTEGERS = st.integers(-(2**70), 2**70)
VALUES = st.one_of(st.none(), st.booleans(), INTEGERS, st.floats(), st.text(max_size=5), st.lists(INTEGERS, max_size=3))


@given(VALUES, st.sampled_from(["", "llama."]))
def test_a_getter_returns_what_it_promises_or_names_the_key(value: object, prefix: str) -> None:
    key = "size"
    settings = Settings(PATH, {prefix + key: value}, prefix)
    kept: dict[str, Any] = {
        "count": lambda got: type(got) is int and 0 < got < 2**31 and got == value,
        "number": lambda got: type(got) is float and 1e-30 <= got <= 1e30 and got == float(value),
        "numbers": lambda got: got and list(got) == [float(one) for one in value],
        "optional_count": lambda got: (got is None and not value) or got == value > 0,
        "optional_number": lambda got: (got is None and not value) or got == float(value) > 0,
    }
    for getter, promised in kept.items():
        try:
            found = getattr(settings, getter)(key)
        except CheckpointError as error:
            assert str(error).startswith(f"model: {prefix}{key} is ") and str(error).isprintable()
        else:
            assert promised(found)


@given(st.sampled_from(["llama3", "yarn"]), st.floats(1.0, 64.0), st.floats(100.0, 1e7), st.integers(64, 10**6))
def test_slow_rotations_are_stretched_more_than_fast_ones_and_none_beyond_the_factor(
    kind: str, factor: float, theta: float, original: int
) -> None:
    made: list[tuple[float, ...]] = []
    shape = SimpleNamespace(head_dim=64, context_length=4096)
    parts: Any = SimpleNamespace(shape=shape, constant=lambda name, values: made.append(values) or name)
    values = {"rope_type": kind, "factor": factor, "rope_theta": theta, "original_max_position_embeddings": original}
    config = Settings(PATH, {"rope_parameters": values})
    found = huggingface_rope(config, rope_section(config), parts, 64)
    (divisors,) = made
    assert len(divisors) == 32 and all(slow > fast - 1e-9 for fast, slow in pairwise(divisors))
    assert divisors[0] >= 1 - 1e-9 and divisors[-1] <= factor * (1 + 1e-9)
    assert found.theta == theta and found.magnitude >= 1
