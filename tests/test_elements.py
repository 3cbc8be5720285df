"""The table of element types against the library that computes with them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import pytest

from offload.elements import BY_GGML_ID, BY_NAME, F8_E4M3, ElementType, element_type
from offload.errors import UnsupportedError


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(
        str(next(path for path in folder.glob("*ggml-base*") if path.suffix in (".so", ".dylib", ".dll")))
    )
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    return library


@pytest.mark.parametrize("element", BY_GGML_ID.values(), ids=str)
def test_geometry_and_name_are_those_of_the_library(ggml: ctypes.CDLL, element: ElementType) -> None:
    assert ggml.ggml_type_name(element.ggml_id).decode().upper() == element.name
    assert ggml.ggml_type_size(element.ggml_id) == element.block_bytes
    assert ggml.ggml_blck_size(element.ggml_id) == element.block_elements


def test_no_storable_type_of_the_library_is_missing(ggml: ctypes.CDLL) -> None:
    """Types that the library knows and the table lacks are its internal ones (q8_1, q8_K: activations only)."""
    known = set()
    for ggml_id in range(num_types(ggml)):
        if ggml.ggml_type_size(ggml_id) > 0:  # removed types keep their number and have no size
            known.add(ggml_id)
    assert {ggml.ggml_type_name(extra).decode() for extra in known - set(BY_GGML_ID)} == {"q8_1", "q8_K"}


def num_types(ggml: ctypes.CDLL) -> int:
    """One past the highest id to ask for: the library aborts on ids that it does not know, so a second list bounds it."""
    gguf = pytest.importorskip("gguf")
    return 1 + min(max(kind.value for kind in gguf.GGMLQuantizationType), max(BY_GGML_ID))


def test_names_and_ids_are_unique() -> None:
    assert set(BY_NAME.values()) == {*BY_GGML_ID.values(), F8_E4M3}
    assert len(BY_NAME) == len(BY_GGML_ID) + 1 and not F8_E4M3.in_ggml


def test_row_bytes_counts_blocks() -> None:
    assert BY_NAME["Q4_K"].row_bytes(4096) == 4096 // 256 * 144
    assert BY_NAME["BF16"].row_bytes(3) == 6
    with pytest.raises(AssertionError):
        BY_NAME["Q4_K"].row_bytes(255)


def test_bits_per_element() -> None:
    assert BY_NAME["Q4_K"].bits_per_element == 4.5
    assert BY_NAME["F16"].bits_per_element == 16
    assert not BY_NAME["F16"].is_quantized
    assert BY_NAME["MXFP4"].is_quantized


def test_lookup_ignores_case_and_names_the_choices() -> None:
    assert element_type("q4_k") is BY_NAME["Q4_K"]
    with pytest.raises(UnsupportedError, match=r"Q9_9.*Q8_0"):
        element_type("Q9_9")
