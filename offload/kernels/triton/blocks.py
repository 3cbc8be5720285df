"""What a program does with quantized blocks: bytes to numbers, in registers, for every type that has a kernel.

A decoder takes pointers to the first bytes of n blocks and gives float32 [n, elements of a block], in an order in which no
data changes places: a byte's two halves stay neighbours. Its `order` says which element of the block stands at a place. The
arithmetic is ggml's `to_float`, step by step, so that values have its bits.

Legend: n blocks, g groups of a block with a scale each, h the half of a byte.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import triton
import triton.language as tl

# Triton reads the functions' sources: what they use of Python's is what its language knows.


@triton.jit
def _half(start):
    """The float16 at each address, as float32."""
    return tl.load(start.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _bytes(start, count: tl.constexpr):
    """`count` bytes from each address on, int32 [n, count]."""
    return tl.load(start[:, None] + tl.arange(0, count)[None, :]).to(tl.int32)


@triton.jit
def _halves(octets):
    """Low and high half of each byte, side by side: [.., k] -> [.., k, 2]."""
    return tl.join(octets & 15, octets >> 4)


@triton.jit
def order_plain(place):
    """As stored."""
    return place


@triton.jit
def order_32(place):
    """A block of 32: all low halves, then all high halves."""
    return place % 2 * 16 + place // 2


@triton.jit
def order_64(place):
    """Groups of 64 that are as `order_32` for 32 bytes."""
    return place // 64 * 64 + place % 2 * 32 + place % 64 // 2


@triton.jit
def order_16(place):
    """Groups of 32 that are as `order_32`."""
    return place // 32 * 32 + order_32(place % 32)


@triton.jit
def order_q6_k(place):
    """Two parts of 64 bytes: low halves of all, then high halves of all."""
    return place // 128 * 128 + place % 2 * 64 + place % 128 // 2


@triton.jit
def f32(block):
    """A number a block."""
    return tl.load(block.to(tl.pointer_type(tl.float32)))[:, None]


@triton.jit
def f16(block):
    """A number a block."""
    return _half(block)[:, None]


@triton.jit
def bf16(block):
    """A number a block: the high half of a float32."""
    high = tl.load(block.to(tl.pointer_type(tl.uint16))).to(tl.uint32)
    return (high << 16).to(tl.float32, bitcast=True)[:, None]


@triton.jit
def _f8_value(code):
    """E4M3 without its scale. Cards before Ada have no such type; a float16 holds it, as a 256th."""
    bits = (code & 0x80) << 8 | (code & 0x7F) << 7
    value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def f8_e4m3(block):
    """A number a block."""
    return _f8_value(tl.load(block).to(tl.int32))[:, None]


@triton.jit
def f8_e4m3_16(block):
    """Sixteen numbers, which are one load."""
    return _f8_value(_bytes(block, 16))


@triton.jit
def q4_0(block):
    """Four bits about 8."""
    codes = _halves(_bytes(block + 2, 16)).reshape(block.shape[0], 32)
    return (codes - 8).to(tl.float32) * _half(block)[:, None]


@triton.jit
def q5_0(block):
    """Five bits about 16; the fifth bits stand together, sixteen for each half."""
    words = (block + 2).to(tl.pointer_type(tl.uint16))  # 22 bytes a block: aligned to two only
    high = tl.load(words[:, None] + tl.arange(0, 2)[None, :]).to(tl.int32)
    fifth = (high[:, None, :] >> tl.arange(0, 16)[None, :, None]) & 1
    codes = _halves(_bytes(block + 6, 16)) | fifth << 4
    return (codes.reshape(block.shape[0], 32) - 16).to(tl.float32) * _half(block)[:, None]


@triton.jit
def q8_0(block):
    """Signed bytes."""
    codes = _bytes((block + 2).to(tl.pointer_type(tl.int8)), 32)
    return codes.to(tl.float32) * _half(block)[:, None]


@triton.jit
def mxfp4(block):
    """Four-bit floats (two exponent bits, one of mantissa) times a power of two; OCP MX v1.0, as in ggml."""
    exponent = tl.load(block).to(tl.int32)
    # half of 2 ** (exponent - 127), since codes count halves; the two smallest are denormal
    bits = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23)
    scale = bits.to(tl.float32, bitcast=True)
    codes = _halves(_bytes(block + 1, 16)).reshape(block.shape[0], 32)
    power, mantissa = codes >> 1 & 3, codes & 1
    size = tl.where(power == 0, mantissa, (2 + mantissa) << tl.maximum(power - 1, 0))
    return tl.where(codes >= 8, -size, size).to(tl.float32) * scale[:, None]


@triton.jit
def _k_scales(block):
    """Scale and minimum of the eight groups of Q4_K and Q5_K, float32 [n, 8] each: six bits, some of them elsewhere."""
    group = tl.arange(0, 8)
    first = tl.load(block[:, None] + 4 + group[None, :] % 4).to(tl.int32)
    second = tl.load(block[:, None] + 8 + group[None, :] % 4).to(tl.int32)
    third = tl.load(block[:, None] + 12 + group[None, :] % 4).to(tl.int32)
    is_early = group[None, :] < 4
    scale = tl.where(is_early, first & 63, third & 15 | first >> 6 << 4)
    minimum = tl.where(is_early, second & 63, third >> 4 | second >> 6 << 4)
    return _half(block)[:, None] * scale.to(tl.float32), _half(block + 2)[:, None] * minimum.to(tl.float32)


@triton.jit
def _k_scaled(block, codes):
    """Codes [n, 4, 32, 2] times scale less minimum."""
    n: tl.constexpr = block.shape[0]
    scales, minima = _k_scales(block)
    values = scales.reshape(n, 4, 1, 2) * codes.to(tl.float32) - minima.reshape(n, 4, 1, 2)
    return values.reshape(n, 256)


@triton.jit
def q4_k(block):
    """Eight groups of 32: four bits, scale and minimum of six bits each."""
    return _k_scaled(block, _halves(_bytes(block + 16, 128).reshape(block.shape[0], 4, 32)))


@triton.jit
def q5_k(block):
    """Eight groups of 32: as Q4_K, with fifth bits that stand together."""
    n: tl.constexpr = block.shape[0]
    low = _halves(_bytes(block + 48, 128).reshape(n, 4, 32))
    group = (tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :]).reshape(1, 4, 1, 2)
    high = _bytes(block + 16, 32).reshape(n, 1, 32, 1) >> group & 1
    return _k_scaled(block, low | high << 4)


@triton.jit
def q6_k(block):
    """Sixteen groups of 16: six bits, scales of a signed byte."""
    n: tl.constexpr = block.shape[0]
    low = _halves(_bytes(block, 128)).reshape(n, 2, 2, 32, 2)  # part, half of the part's bytes, byte, h
    shift = (tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :] * 4).reshape(1, 1, 2, 1, 2)
    high = _bytes(block + 128, 64).reshape(n, 2, 1, 32, 1) >> shift & 3
    codes = (low | high << 4) - 32
    place = tl.arange(0, 16)  # part, half of the part's bytes, half of those, h
    group = place // 8 * 8 + place % 2 * 4 + place // 4 % 2 * 2 + place // 2 % 2
    signed = tl.load((block + 192).to(tl.pointer_type(tl.int8))[:, None] + group[None, :]).to(tl.float32)
    scales = (_half(block + 208)[:, None] * signed).reshape(n, 8, 1, 2)
    return (scales * codes.reshape(n, 8, 16, 2).to(tl.float32)).reshape(n, 256)


@triton.jit
def _iq4_value(code):
    """The sixteen levels of IQ4: eight to a word, a signed byte each."""
    low: tl.constexpr = tl.constexpr(-0x0915_2230_4052_677F)
    high: tl.constexpr = tl.constexpr(0x7159_4535_2619_0D01)
    word = tl.where(code < 8, low, high)
    octet = (word >> (code % 8 * 8).to(tl.int64)).to(tl.int32) & 255
    return tl.where(octet >= 128, octet - 256, octet)


@triton.jit
def iq4_xs(block):
    """Eight groups of 32: levels from a table, signed scales of six bits: four of each in one place, two in another."""
    n: tl.constexpr = block.shape[0]
    group = tl.arange(0, 8)
    low = tl.load(block[:, None] + 4 + group[None, :] // 2).to(tl.int32) >> (group[None, :] % 2 * 4) & 15
    high = tl.load((block + 2).to(tl.pointer_type(tl.uint16))).to(tl.int32)[:, None] >> (group[None, :] * 2) & 3
    scales = _half(block)[:, None] * ((low | high << 4) - 32).to(tl.float32)
    values = _iq4_value(_halves(_bytes(block + 8, 128))).reshape(n, 8, 32).to(tl.float32)
    return (scales.reshape(n, 8, 1) * values).reshape(n, 256)


class Format(NamedTuple):
    """How a type is decoded: `decode(pointers)`, and which element of the block stands at a place, `order(place)`."""

    decode: Any
    order: Any


FORMATS: Final = {
    "BF16": Format(bf16, order_plain),
    "F16": Format(f16, order_plain),
    "F32": Format(f32, order_plain),
    "F8_E4M3": Format(f8_e4m3, order_plain),
    "IQ4_XS": Format(iq4_xs, order_16),
    "MXFP4": Format(mxfp4, order_32),
    "Q4_0": Format(q4_0, order_32),
    "Q4_K": Format(q4_k, order_64),
    "Q5_0": Format(q5_0, order_32),
    "Q5_K": Format(q5_k, order_64),
    "Q6_K": Format(q6_k, order_q6_k),
    "Q8_0": Format(q8_0, order_plain),
}
"""By the names of `offload.elements`."""
F8_TOGETHER: Final = 16
F8_16: Final = Format(f8_e4m3_16, order_plain)
"""For rows of FP8 that are a whole number of sixteens."""
