"""Element types of checkpoint tensors: every type that ggml stores, with its block geometry, and FP8, which it does not.

Numbers and names are those of `ggml.h` (enum ggml_type); sizes are checked against the loaded library in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from offload.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class ElementType:
    """A storage type: `block_elements` consecutive elements of a row are stored in `block_bytes` bytes.

    `ggml_id` is None where ggml has no such type, and the CPU backend no kernel.
    """

    name: str
    ggml_id: int | None
    block_elements: int
    block_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.block_elements > 1

    @property
    def in_ggml(self) -> bool:
        return self.ggml_id is not None

    @property
    def bits_per_element(self) -> float:
        return 8 * self.block_bytes / self.block_elements

    def row_bytes(self, elements: int) -> int:
        """Bytes of a row of `elements`, which must be a multiple of `block_elements`."""
        assert elements % self.block_elements == 0, (self.name, elements)
        return elements // self.block_elements * self.block_bytes

    def __str__(self) -> str:
        return self.name


_TABLE: Final = (
    ElementType("F32", 0, 1, 4),
    ElementType("F16", 1, 1, 2),
    ElementType("Q4_0", 2, 32, 18),
    ElementType("Q4_1", 3, 32, 20),
    ElementType("Q5_0", 6, 32, 22),
    ElementType("Q5_1", 7, 32, 24),
    ElementType("Q8_0", 8, 32, 34),
    ElementType("Q2_K", 10, 256, 84),
    ElementType("Q3_K", 11, 256, 110),
    ElementType("Q4_K", 12, 256, 144),
    ElementType("Q5_K", 13, 256, 176),
    ElementType("Q6_K", 14, 256, 210),
    ElementType("IQ2_XXS", 16, 256, 66),
    ElementType("IQ2_XS", 17, 256, 74),
    ElementType("IQ3_XXS", 18, 256, 98),
    ElementType("IQ1_S", 19, 256, 50),
    ElementType("IQ4_NL", 20, 32, 18),
    ElementType("IQ3_S", 21, 256, 110),
    ElementType("IQ2_S", 22, 256, 82),
    ElementType("IQ4_XS", 23, 256, 136),
    ElementType("I8", 24, 1, 1),
    ElementType("I16", 25, 1, 2),
    ElementType("I32", 26, 1, 4),
    ElementType("I64", 27, 1, 8),
    ElementType("F64", 28, 1, 8),
    ElementType("IQ1_M", 29, 256, 56),
    ElementType("BF16", 30, 1, 2),
    ElementType("TQ1_0", 34, 256, 54),
    ElementType("TQ2_0", 35, 256, 66),
    ElementType("MXFP4", 39, 32, 17),
    ElementType("NVFP4", 40, 64, 36),
    ElementType("Q1_0", 41, 128, 18),
    ElementType("Q2_0", 42, 64, 18),
)
F8_E4M3: Final = ElementType("F8_E4M3", None, 1, 1)
"""Four bits of exponent, three of mantissa, no infinities (OCP 8-bit Floating Point, E4M3). A matrix of them has scales."""

BY_GGML_ID: Final = {element.ggml_id: element for element in _TABLE if element.ggml_id is not None}
BY_NAME: Final = {element.name: element for element in (*_TABLE, F8_E4M3)}

F32: Final = BY_NAME["F32"]
F16: Final = BY_NAME["F16"]
BF16: Final = BY_NAME["BF16"]


class KVTypes(NamedTuple):
    """How the KV cache stores keys, and values where it keeps any."""

    key: ElementType
    value: ElementType


INTEGER_OR_DOUBLE: Final = frozenset({"I8", "I16", "I32", "I64", "F64"})
"""Types a file may hold and no weight matrix may use."""


def element_type(name: str) -> ElementType:
    """The type called `name`, case ignored.

    Raises:
        UnsupportedError: no such type.
    """
    try:
        return BY_NAME[name.upper()]
    except KeyError:
        raise UnsupportedError(f"element type {name!r} is not one of {', '.join(sorted(BY_NAME))}") from None


def kv_types(key: str, value: str | None = None) -> KVTypes:
    """The types of these names; values are stored as keys are unless named.

    Raises:
        UnsupportedError: no such type.
    """
    return KVTypes(element_type(key), element_type(key if value is None else value))
