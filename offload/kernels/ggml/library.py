"""ggml's shared libraries, as llama-cpp-python ships them, through ctypes.

Pointers are opaque integers; the fields of `ggml_tensor` that are ever written, `data`, `nb` and `flags`, are found at run
time. Nothing here knows models or tiers. Call `load_library()`; it checks every symbol that is used, so that an incompatible
build fails at start with one clear line and not in the middle of a token.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)  # fmt: skip
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from offload.errors import BackendError
from offload.kernels.ops import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


AbortCallback = ctypes.CFUNCTYPE(c_bool, c_void_p)

_P, _I, _L, _F, _Z = c_void_p, c_int, c_int64, c_float, c_size_t
_BASE: Final[Mapping[str, tuple[object, tuple[object, ...]]]] = {
    "ggml_version": (c_char_p, ()),
    "ggml_init": (_P, (_InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_tensor_overhead": (_Z, ()),
    "ggml_graph_overhead_custom": (_Z, (_Z, c_bool)),
    "ggml_new_graph_custom": (_P, (_P, _Z, c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_graph_n_nodes": (_I, (_P,)),
    "ggml_graph_node": (_P, (_P, _I)),
    "ggml_graph_add_node": (None, (_P, _P)),
    "ggml_new_tensor_1d": (_P, (_P, _I, _L)),
    "ggml_new_tensor_2d": (_P, (_P, _I, _L, _L)),
    "ggml_new_tensor_3d": (_P, (_P, _I, _L, _L, _L)),
    "ggml_set_output": (None, (_P,)),
    "ggml_get_data": (_P, (_P,)),
    "ggml_get_type_traits": (POINTER(_TypeTraits), (_I,)),
    "ggml_type_size": (_Z, (_I,)),
    "ggml_blck_size": (_L, (_I,)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_mul_mat_id": (_P, (_P, _P, _P, _P)),
    "ggml_mul_mat_set_hint": (None, (_P, _I)),
    "ggml_argsort_top_k": (_P, (_P, _P, _I)),
    "ggml_soft_max": (_P, (_P, _P)),
    "ggml_sigmoid": (_P, (_P, _P)),
    "ggml_sum_rows": (_P, (_P, _P)),
    "ggml_clamp": (_P, (_P, _P, _F, _F)),
    "ggml_div": (_P, (_P, _P, _P)),
    "ggml_fill": (_P, (_P, _P, _F)),
    "ggml_add_id": (_P, (_P, _P, _P, _P)),
    "ggml_swiglu_oai": (_P, (_P, _P, _P, _F, _F)),
    "ggml_mul": (_P, (_P, _P, _P)),
    "ggml_add": (_P, (_P, _P, _P)),
    "ggml_scale": (_P, (_P, _P, _F)),
    "ggml_tanh": (_P, (_P, _P)),
    "ggml_rms_norm": (_P, (_P, _P, _F)),
    "ggml_rope_ext": (_P, (_P, _P, _P, _P, _I, _I, _I, _F, _F, _F, _F, _F, _F)),
    "ggml_glu_split": (_P, (_P, _P, _P, _I)),
    "ggml_get_rows": (_P, (_P, _P, _P)),
    "ggml_set_rows": (_P, (_P, _P, _P, _P)),
    "ggml_cont": (_P, (_P, _P)),
    "ggml_concat": (_P, (_P, _P, _P, _I)),
    "ggml_repeat_4d": (_P, (_P, _P, _L, _L, _L, _L)),
    "ggml_permute": (_P, (_P, _P, _I, _I, _I, _I)),
    "ggml_reshape_2d": (_P, (_P, _P, _L, _L)),
    "ggml_reshape_3d": (_P, (_P, _P, _L, _L, _L)),
    "ggml_reshape_4d": (_P, (_P, _P, _L, _L, _L, _L)),
    "ggml_view_2d": (_P, (_P, _P, _L, _L, _Z, _Z)),
    "ggml_view_3d": (_P, (_P, _P, _L, _L, _L, _Z, _Z, _Z)),
    "ggml_flash_attn_ext": (_P, (_P, _P, _P, _P, _P, _F, _F, _F)),
    "ggml_flash_attn_ext_add_sinks": (None, (_P, _P)),
    "ggml_prec_set_acc": (c_bool, (_P, _I)),
    "ggml_gallocr_new": (_P, (_P,)),
    "ggml_gallocr_free": (None, (_P,)),
    "ggml_gallocr_alloc_graph": (c_bool, (_P, _P)),
    "ggml_gallocr_get_buffer_size": (_Z, (_P, _I)),
    "ggml_backend_cpu_buffer_type": (_P, ()),
    "ggml_backend_cpu_buffer_from_ptr": (_P, (_P, _Z)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_tensor_alloc": (_I, (_P, _P, _P)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
    "ggml_backend_free": (None, (_P,)),
}
_CPU: Final[Mapping[str, tuple[object, tuple[object, ...]]]] = {
    "ggml_backend_cpu_init": (_P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_P, _I)),
    "ggml_backend_cpu_set_abort_callback": (None, (_P, AbortCallback, _P)),
    **{f"ggml_cpu_has_{feature}": (_I, ()) for feature in ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon")},
}

I32: Final = 26  # ggml's numbers of the integer types, which no weight has
I64: Final = 27
STATUS_SUCCESS: Final = 0
STATUS_ABORTED: Final = 1
FLOAT_BYTES: Final = 4
PREC_F32: Final = 10
HINT_HADAMARD: Final = 1  # the first factor is such a matrix, so that sums of pairs give the product
ROPE_INTERLEAVED: Final = 0
ROPE_HALVES: Final = 2
GLU_OPS: Final = {"gelu_tanh": 1, "silu": 2, "gelu": 4}


class Library:
    """The bound functions, as attributes under ggml's own names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bind(self._open("ggml-base"), _BASE)
        self._bind(self._open("ggml-cpu"), _CPU)
        self.data_offset = self._find_data_offset()
        self.strides_offset = self._find_strides_offset()
        self.flags_offset = self._find_flags_offset()
        self.is_set = _strlen()

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:  # only for names that _bind did not set
        raise AttributeError(f"ggml function {name} is not in the table of library.py")

    def _open(self, name: str) -> ctypes.CDLL:
        pattern = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}.get(sys.platform, f"lib{name}.so")
        path = self.folder / pattern
        try:
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            reason = "is missing" if not path.exists() else f"cannot be loaded: {error}"
            raise BackendError(
                f"kernel library {path} {reason}; reinstall it: pip install --force-reinstall llama-cpp-python"
            ) from None

    def _bind(self, library: ctypes.CDLL, table: Mapping[str, tuple[object, tuple[object, ...]]]) -> None:
        for name, (result, arguments) in table.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise BackendError(
                    f"kernel library {library._name} has no {name}: llama-cpp-python is too old or too new; "
                    f"install the version that this release was tested with (0.3.36)"
                ) from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def _find_data_offset(self) -> int:
        """Where `data` lies in `struct ggml_tensor`: the only word of a fresh tensor that holds its data address."""
        size = 4096
        context = self.ggml_init(_InitParams(size, None, False))
        tensor = self.ggml_new_tensor_1d(context, 0, 1)
        words = (c_uint64 * (self.ggml_tensor_overhead() // 8)).from_address(tensor)
        places = [index for index, word in enumerate(words) if word == self.ggml_get_data(tensor)]
        self.ggml_free(context)
        if len(places) != 1:
            raise BackendError(f"kernel library in {self.folder}: cannot find the data field of a tensor")
        return places[0] * 8

    def _find_strides_offset(self) -> int:
        """Where `nb`, the distances in bytes, lies in `struct ggml_tensor`: behind the sizes of a tensor like no other."""
        context = self.context(self.ggml_tensor_overhead())
        tensor = self.ggml_new_tensor_3d(context, 0, 3, 5, 7)
        words = list((c_uint64 * (self.ggml_tensor_overhead() // 8)).from_address(tensor))
        self.ggml_free(context)
        known = [3, 5, 7, 1, 4, 4 * 3, 4 * 3 * 5, 4 * 3 * 5 * 7]
        places = [index for index in range(len(words)) if words[index : index + len(known)] == known]
        if len(places) != 1:
            raise BackendError(f"kernel library in {self.folder}: cannot find the strides of a tensor")
        return (places[0] + 4) * 8

    def _find_flags_offset(self) -> int:
        """Where `flags` lies in `struct ggml_tensor`: the only word that changes when a tensor is marked as an output."""
        context = self.context(self.ggml_tensor_overhead())
        tensor = self.ggml_new_tensor_1d(context, 0, 1)
        words = (c_uint32 * (self.ggml_tensor_overhead() // 4)).from_address(tensor)
        before = list(words)
        self.ggml_set_output(tensor)
        places = [index for index, word in enumerate(words) if word != before[index]]
        self.ggml_free(context)
        if len(places) != 1:
            raise BackendError(f"kernel library in {self.folder}: cannot find the flags of a tensor")
        return places[0] * 4

    def context(self, nbytes: int) -> int:
        """A context of `nbytes` for tensor descriptions only; tensors made in it have no memory."""
        context = self.ggml_init(_InitParams(nbytes, None, True))
        if not context:
            raise BackendError(f"ggml_init: no memory for a context of {nbytes} bytes")
        return int(context)

    def substitute(self, node: int, original: int, num_rows: int) -> None:
        """Lets the matrix `node` stand in a graph for some columns of `original`: rows as far apart, and marked alike."""
        ours, theirs = ((c_uint64 * 4).from_address(tensor + self.strides_offset) for tensor in (node, original))
        ours[1], ours[2], ours[3] = theirs[1], theirs[1] * num_rows, theirs[1] * num_rows
        self.mark(node, original)

    def mark(self, node: int, original: int) -> None:
        """Has the node computed as one that was put into a graph in the ordinary way."""
        ours, theirs = (c_uint32.from_address(tensor + self.flags_offset) for tensor in (node, original))
        ours.value = theirs.value

    def set_matrix_stride(self, tensor: int, stride: int, count: int) -> None:
        """Lets the `count` matrices of a tensor lie `stride` bytes apart."""
        strides = (c_uint64 * 4).from_address(tensor + self.strides_offset)
        strides[2], strides[3] = stride, stride * count

    def set_strides(self, tensor: int, row: int, matrix: int, count: int) -> None:
        """Lets the rows of a tensor's `count` matrices lie `row` bytes apart, and the matrices `matrix` bytes."""
        strides = (c_uint64 * 4).from_address(tensor + self.strides_offset)
        strides[1], strides[2], strides[3] = row, matrix, matrix * count

    def strides(self, tensor: int) -> tuple[int, ...]:
        """How many bytes the next element, row, matrix, and stack of matrices of a tensor are away."""
        return tuple((c_uint64 * 4).from_address(tensor + self.strides_offset))

    def widen(self, node: int, num_heads: int) -> None:
        """Lets the result of attention for some heads lie among those of `num_heads`."""
        sizes, strides = (
            (c_uint64 * 4).from_address(tensor)
            for tensor in (node + self.strides_offset - 32, node + self.strides_offset)
        )
        sizes[1] = num_heads
        strides[2] = strides[3] = strides[1] * num_heads

    def gated_unit(self, context: int, gate: int, up: int, activation: Activation) -> int:
        """`Ops.glu` of two tensors, as a node."""
        if activation == "swiglu_oai":
            return int(self.ggml_swiglu_oai(context, gate, up, SWIGLU_ALPHA, SWIGLU_LIMIT))
        return int(self.ggml_glu_split(context, gate, up, GLU_OPS[activation]))

    def data_cell(self, tensor: int) -> c_uint64:
        """The tensor's data pointer, writable: `cell.value = address` moves the tensor."""
        return c_uint64.from_address(tensor + self.data_offset)


def _strlen() -> object:
    """The C function, as something to ask whether to abort.

    Given the address of a flag that is an empty string until it is set, it answers 0 or 1, and, unlike a function in
    Python, needs neither the interpreter nor its lock for that, hundreds of times per token.
    """
    c = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    return ctypes.cast(c.strlen, AbortCallback)


@cache
def load_library() -> Library:
    """The libraries of the installed llama-cpp-python.

    Raises:
        BackendError: not installed, not loadable, or lacking a function.
    """
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise BackendError(
            "llama-cpp-python is not installed, and the CPU kernels come from it; pip install llama-cpp-python"
        )
    return Library(Path(spec.submodule_search_locations[0]) / "lib")
