"""Names, windows and footprints of blocks."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from offload.blocks import BlockKey, BlockSpec, Extent
from offload.units import PAGE

FILE = Path("model.gguf")
extents = st.builds(
    lambda offset, nbytes: Extent(path=FILE, offset=offset, nbytes=nbytes),
    st.integers(0, 2**45),
    st.integers(1, 2**34),
)


@given(extents)
def test_the_window_is_the_smallest_aligned_range_around_the_extent(extent: Extent) -> None:
    window_end = extent.window_offset + extent.window_nbytes
    assert extent.window_offset % PAGE == window_end % PAGE == 0
    assert extent.window_offset <= extent.offset < extent.window_offset + PAGE
    assert window_end - PAGE < extent.end <= window_end


@given(extents)
def test_lead_is_where_the_extent_starts_in_its_window(extent: Extent) -> None:
    assert extent.window_offset + extent.lead == extent.offset
    assert 0 <= extent.lead < PAGE


def test_a_block_on_disk_occupies_its_window() -> None:
    key = BlockKey("weight", 3, "blk.3.ffn_down.weight")
    straddling = Extent(path=FILE, offset=PAGE - 1, nbytes=2)
    assert BlockSpec(key=key, nbytes=2, extent=straddling).footprint == 2 * PAGE


def test_a_block_born_in_memory_occupies_whole_pages() -> None:
    assert BlockSpec(key=BlockKey("kv", 0, "kv.0"), nbytes=PAGE + 1).footprint == 2 * PAGE


def test_keys_are_values_that_sort_and_read_well() -> None:
    first, second = BlockKey("expert", 2, "blk.2.ffn", 0), BlockKey("expert", 2, "blk.2.ffn", 7)
    assert {first: 1}[BlockKey("expert", 2, "blk.2.ffn")] == 1
    assert first < second
    assert (str(first), str(second)) == ("expert:blk.2.ffn", "expert:blk.2.ffn[7]")
