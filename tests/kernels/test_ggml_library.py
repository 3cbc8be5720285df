"""ggml's libraries, what goes wrong when they are not the right ones, the memory of graphs, and ggml's own decoders."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import offload.kernels.ggml.library as library_module
from offload.elements import element_type
from offload.errors import BackendError, UnsupportedError
from offload.kernels.ggml.dequantize import dequantize
from offload.kernels.ggml.library import Library, load_library
from offload.kernels.ggml.workspace import MAX_GRAPHS, Graph, Workspace


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(BackendError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- loading


def test_a_missing_library_is_named_with_what_to_do(tmp_path: Path) -> None:
    message = error_of(lambda: Library(tmp_path))
    assert str(tmp_path / "libggml-base") in message and " is missing; reinstall it: pip install" in message


def test_a_file_that_is_no_library_is_named_with_the_reason(tmp_path: Path) -> None:
    for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
        (tmp_path / name).write_bytes(b"not a library" * 100)
    message = error_of(lambda: Library(tmp_path))
    assert "cannot be loaded" in message and "is missing" not in message


@pytest.mark.parametrize(("table", "file"), [("_BASE", "ggml-base"), ("_CPU", "ggml-cpu")])
def test_a_function_that_a_build_lacks_is_named(monkeypatch: pytest.MonkeyPatch, table: str, file: str) -> None:
    functions = {**getattr(library_module, table), "ggml_of_tomorrow": (ctypes.c_int, ())}
    monkeypatch.setattr(library_module, table, functions)
    message = error_of(lambda: Library(load_library().folder))
    assert file in message and "has no ggml_of_tomorrow" in message and "too old or too new" in message


def test_without_llama_cpp_python_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "find_spec", lambda name: None)
    assert "llama-cpp-python is not installed" in error_of(load_library.__wrapped__)


def test_the_library_is_loaded_once_and_has_only_the_functions_of_its_table() -> None:
    assert load_library() is load_library()
    with pytest.raises(AttributeError, match=r"ggml_abort is not in the table of library\.py"):
        load_library().ggml_abort()


# ---- fields of a tensor


def test_the_data_cell_moves_a_tensor() -> None:
    lib = load_library()
    context = lib.context(2 * lib.ggml_tensor_overhead())
    moved, other = (lib.ggml_new_tensor_1d(context, 0, 8) for _ in range(2))
    lib.data_cell(moved).value = 0x1230
    assert (lib.ggml_get_data(moved), lib.ggml_get_data(other)) == (0x1230, None)
    lib.ggml_free(context)


def test_a_substitute_has_the_strides_and_the_mark_of_the_original() -> None:
    lib = load_library()
    nbytes = ctypes.CDLL(lib._open("ggml-base")._name).ggml_nbytes
    nbytes.restype, nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    context = lib.context(2 * lib.ggml_tensor_overhead())
    node, original = lib.ggml_new_tensor_2d(context, 0, 10, 7), lib.ggml_new_tensor_2d(context, 0, 30, 7)
    lib.ggml_set_output(original)
    assert nbytes(node) == 10 * 7 * 4
    lib.substitute(node, original, 7)
    assert nbytes(node) == (6 * 30 + 10) * 4, "as far apart as in the original, and the last row no longer than it is"
    marks = [ctypes.c_uint32.from_address(tensor + lib.flags_offset).value for tensor in (node, original)]
    assert marks[0] == marks[1] != 0
    lib.ggml_free(context)


@pytest.mark.parametrize(
    ("function", "broken", "find", "field"),
    [
        ("ggml_get_data", lambda tensor: 0xDEAD, "_find_data_offset", "data field"),
        ("ggml_new_tensor_3d", lambda context, *_: load_library().ggml_new_tensor_1d(context, 0, 1),
         "_find_strides_offset", "strides"),
        ("ggml_set_output", lambda tensor: None, "_find_flags_offset", "flags"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_found_is_an_error(
    function: str, broken: Callable[..., object], find: str, field: str
) -> None:
    lib = Library(load_library().folder)
    assert getattr(lib, find)() > 0
    setattr(lib, function, broken)
    message = error_of(getattr(lib, find))
    assert str(lib.folder) in message and f"cannot find the {field}" in message


# ---- memory of graphs


def filled(count: int) -> tuple[SimpleNamespace, Workspace, list[Graph]]:
    """A workspace of 100 bytes with cached graphs; graph i has the contexts 2 i and 2 i + 1. In place of the library
    stands one where a graph is the number of bytes that it needs, and 1000 are there."""
    lib = SimpleNamespace(freed=[], allocators=[], size=0)

    def allocate(allocator: int, graph: int) -> bool:
        lib.size = max(lib.size, graph)
        return graph <= 1000

    lib.ggml_backend_cpu_buffer_type = lambda: 7
    lib.ggml_gallocr_new = lambda kind: lib.allocators.append(kind) or len(lib.allocators)
    lib.ggml_gallocr_free = lambda allocator: setattr(lib, "size", 0)
    lib.ggml_gallocr_get_buffer_size = lambda allocator, chunk: lib.size
    lib.ggml_gallocr_alloc_graph = allocate
    lib.ggml_free = lib.freed.append
    workspace = Workspace(lib)  # type: ignore[arg-type]
    workspace.allocate(100)
    graphs = [graph_of(2 * i, 2 * i + 1) for i in range(count)]
    for number, graph in enumerate(graphs):
        workspace.add(number, graph)
    return lib, workspace, graphs


def graph_of(*contexts: int) -> Graph:
    return Graph(contexts, (), {}, {}, ctypes.c_uint64(), [], (), {})


def test_the_graph_that_was_not_asked_for_longest_makes_room() -> None:
    lib, workspace, graphs = filled(MAX_GRAPHS)
    assert workspace.get("unknown") is None and workspace.get(0) is graphs[0] and lib.freed == []
    workspace.add("one more", graph_of(77))
    assert lib.freed == [2, 3] and workspace.get(1) is None
    assert all(workspace.get(number) is graphs[number] for number in (0, *range(2, MAX_GRAPHS)))


def test_cached_graphs_are_dropped_when_the_memory_grows_and_only_then() -> None:
    lib, workspace, graphs = filled(2)
    workspace.allocate(60)
    assert (workspace.nbytes, lib.freed, workspace.get(0)) == (100, [], graphs[0])
    workspace.allocate(101)
    assert (workspace.nbytes, sorted(lib.freed), workspace.get(0)) == (101, [0, 1, 2, 3], None)


def test_a_graph_without_room_is_an_error_that_says_what_to_change() -> None:
    _, workspace, _ = filled(0)
    assert "lower --ctx or raise --ram" in error_of(lambda: workspace.allocate(1001))


def test_a_released_workspace_is_empty_and_takes_memory_anew() -> None:
    lib, workspace, _ = filled(3)
    assert workspace.nbytes == 100
    workspace.release()
    assert (workspace.nbytes, sorted(lib.freed), workspace.get(2)) == (0, [0, 1, 2, 3, 4, 5], None)
    workspace.release()
    workspace.allocate(40)
    assert (workspace.nbytes, len(lib.allocators)) == (40, 2)


# ---- decoders


def test_decoded_floats_are_a_copy_of_as_many_as_were_asked_for() -> None:
    stored = np.array([1.5, -2.0, 7.0], np.float32)
    decoded = dequantize(stored.view(np.uint8), element_type("F32"), 2)
    assert decoded.tolist() == [1.5, -2.0]
    stored[0] = 9
    assert decoded[0] == 1.5


def test_a_type_without_a_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="element type I32: ggml cannot convert it"):
        dequantize(np.zeros(4, np.uint8), element_type("I32"), 1)
