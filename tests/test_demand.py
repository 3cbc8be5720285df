"""Demand arithmetic on made-up models: every byte once, batches within bounds, budgets that grow with what is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint

from offload import demand
from offload.blocks import Extent
from offload.config import MICRO_BATCH_TOKENS
from offload.demand import MAX_MICRO_BATCHES, QUIET_READING, Demand, Rates, logits_rows, model_blocks
from offload.elements import BY_NAME, kv_types
from offload.kernels.ggml.cache import cache_nbytes
from offload.models.base import Model, ModelConfig, Vector
from offload.models.checkpoint import open_checkpoint
from offload.models.checkpoint.base import TensorInfo
from offload.models.parts import movable_parts
from offload.models.registry import build_model
from offload.planning import full_budget, make_plan, minimum_budget
from offload.units import MIB, align_up

RATES = Rates(disk_bps=1e9, kernel_bps={"F32": 1e10, "Q4_0": 5e9})


def make_model(
    layers: int, hidden: int, inner: int, vocab: int, element: str, tied: bool, windows: list[int | None]
) -> Model:
    """Two stages a layer and a head; tensors lie in one file, one behind the other."""
    matrices: dict[str, TensorInfo] = {}
    end = 777

    def tensor(name: str, rows: int, columns: int) -> TensorInfo:
        nonlocal end
        kind = BY_NAME[element]
        extent = Extent(path=Path("/m"), offset=end, nbytes=rows * kind.row_bytes(columns))
        end = extent.end
        return TensorInfo(name=name, element=kind, shape=(rows, columns), extent=extent)

    table = tensor("token_embd.weight", vocab, hidden)
    stages = []
    for layer in range(layers):
        shapes = {"q": (hidden, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        matrices |= {f"blk.{layer}.{name}.weight": tensor(name, *shape) for name, shape in shapes.items()}
        stages += [(layer, (f"blk.{layer}.q.weight",)), (layer, (f"blk.{layer}.up.weight", f"blk.{layer}.down.weight"))]
    matrices["output.weight"] = table if tied else tensor("output.weight", vocab, hidden)
    config = ModelConfig(
        architecture="llama", num_layers=layers, hidden_size=hidden, num_heads=2, num_kv_heads=1, head_dim=hidden // 2,
        intermediate_size=inner, vocab_size=vocab, context_length=8192, sliding_windows=tuple(windows[:layers]),
    )  # fmt: skip
    return Model(
        config=config, matrices=matrices, embedding=table, head_parts=1,
        stages=tuple(SimpleNamespace(layer=layer, matrices=names) for layer, names in [*stages, (-1, ("output.weight",))]),
        parts={name: movable_parts(matrix) for name, matrix in matrices.items()}, vectors={"v": Vector(values=(1.0,) * 8)},
    )  # fmt: skip


MODELS = st.builds(
    make_model, st.integers(1, 4), st.sampled_from([256, 2048, 4096]), st.sampled_from([512, 5000 * 32, 8192]),
    st.sampled_from([320, 6400, 50_001]), st.sampled_from(["F32", "Q4_0"]), st.booleans(),
    st.lists(st.sampled_from([None, 100, 2000]), min_size=4, max_size=4),
)  # fmt: skip
CONTEXTS = st.integers(1, 8192)


def demand_of(model: Model, ctx: int, kv_type: str = "f16", **options: Any) -> Demand:
    needs: Mapping[str, Any] = {
        "in_parts": True, "kv_bytes": cache_nbytes(model, ctx, kv_types(kv_type)), "workspace_bytes": 3 * MIB,
        "prompt_bytes": 20 * MIB, "micro_batch_bytes": MIB, "lends": True, "base_bytes": 50 * MIB, "rates": RATES,
        "budget_bytes": None,
    }  # fmt: skip
    return demand.make_demand(model, ctx=ctx, **{**needs, **options})


@given(MODELS)
def test_blocks_cover_every_matrix_once_in_order_of_use_and_parts_add_up_to_it(model: Model) -> None:
    whole, parts = model_blocks(model, in_parts=False), model_blocks(model, in_parts=True)
    used = [(stage.layer, name) for stage in model.stages for name in stage.matrices]
    assert [(block.key.layer, block.key.name) for block in whole] == used
    assert len({block.key for block in parts}) == len(parts)
    assert list(dict.fromkeys((block.key.layer, block.key.name) for block in parts)) == used
    stages = [stage.matrices for stage in model.stages]
    for in_parts, expected in ((True, [(block.key.name,) for block in parts]), (False, stages)):
        need = demand_of(model, 512, in_parts=in_parts)
        groups = [tuple(need.blocks[index].key.name for index in group) for group in need.groups]
        assert groups == expected, "what must be there together"
    assert demand.is_tied(model) == (model.matrices["output.weight"] is model.embedding) == (need.embedding is None)
    for block in whole:
        mine = [part for part in parts if part.key.name == block.key.name]
        assert block.extent == model.matrices[block.key.name].extent
        assert [part.key.part for part in mine] == list(range(len(mine)))
        assert sum(part.nbytes for part in mine) == block.nbytes
        end = model.matrices[block.key.name].extent.offset
        for part in mine:
            assert part.extent is not None and (part.extent.offset, part.nbytes) == (end, part.extent.nbytes)
            end = part.extent.end


@given(
    st.integers(1, 2**30), st.none() | st.integers(0, 2**40), st.floats(0, 100), st.floats(1e-3, 100), st.floats(1, 4),
    st.booleans(),
)  # fmt: skip
def test_micro_batches_cover_the_reading_within_a_share_of_the_budget(
    nbytes: int, budget: int | None, reading_s: float, computing_s: float, more: float, lends: bool
) -> None:
    def micro_batches(budget: int | None, reading_s: float) -> int:
        return demand.micro_batches_per_pass(nbytes, budget, reading_s, computing_s, lends=lends)

    count = micro_batches(budget, reading_s)
    assert 1 <= count <= MAX_MICRO_BATCHES
    if budget is None:
        assert count == 1
        return
    covered_s, share = reading_s * (QUIET_READING if lends else 1), 10 if lends else 20
    assert count == 1 or (share * count * nbytes <= budget and (count - 1) * computing_s < covered_s * 1.000001)
    fits_one_more = share * (count + 1) * nbytes <= budget and count < MAX_MICRO_BATCHES
    assert not fits_one_more or count * computing_s * 1.000001 >= covered_s, "one more would hide reading"
    assert micro_batches(budget, reading_s * more) >= count
    assert micro_batches(int(budget * more), reading_s) >= count


@given(MODELS, CONTEXTS, CONTEXTS, st.booleans())
def test_budgets_grow_with_the_context_and_with_the_cache_s_type(model: Model, a: int, b: int, in_parts: bool) -> None:
    short, long = sorted((a, b))
    for kv_type in ("f16", "f32"):
        less, more = (demand_of(model, ctx, kv_type, in_parts=in_parts) for ctx in (short, long))
        assert minimum_budget(less) <= minimum_budget(more)
        assert full_budget(less) <= full_budget(more)
        assert minimum_budget(less) <= full_budget(less)
    half, full = (demand_of(model, long, kv_type, in_parts=in_parts) for kv_type in ("f16", "f32"))
    caches = [align_up(cache_nbytes(model, long, kv_types(kv_type))) for kv_type in ("f16", "f32")]
    assert minimum_budget(full) - minimum_budget(half) == full_budget(full) - full_budget(half) == caches[1] - caches[0]


@given(MODELS, CONTEXTS, st.integers(0, 2**34), st.booleans())
def test_more_micro_batches_than_one_cost_a_small_share_of_the_budget(
    model: Model, ctx: int, extra: int, lends: bool
) -> None:
    least = demand_of(model, ctx, lends=lends)
    budget = minimum_budget(least) + extra
    roomy = demand_of(model, ctx, lends=lends, budget_bytes=budget)
    per_batch, rows = demand.micro_batch_nbytes(model, ctx) + MIB, min(256, ctx)
    batches = roomy.prefill_tokens_per_pass // rows
    assert least.prefill_tokens_per_pass == rows
    assert sum(roomy.fixed.values()) - sum(least.fixed.values()) == (batches - 1) * per_batch
    assert (batches - 1) * per_batch <= budget // (10 if lends else 20)
    if budget >= minimum_budget(roomy):
        assert make_plan(roomy, budget).used_bytes <= budget
    for tokens in (0, ctx // 2, ctx):
        for prompt in (False, True):
            most = roomy.fixed["kv"] + roomy.fixed["workspace"] if lends else 0
            assert 0 <= roomy.idle(tokens, prompt=prompt) <= most


def test_rows_of_logits_fit_the_largest_graph_however_small_the_vocabulary(tmp_path: Path) -> None:
    model = build_model(open_checkpoint(tiny_checkpoint("llama", tmp_path)), 64)
    assert logits_rows(model) == MICRO_BATCH_TOKENS
    large = replace(model, config=replace(model.config, vocab_size=262_144))
    assert 1 <= logits_rows(large) < 16
