"""Files that lie: for each, the bytes and a piece of the error that must name what is wrong."""

from __future__ import annotations

import struct
from pathlib import Path

from support.headers import (
    ARRAY,
    BOOL,
    F32,
    GGML_F32,
    GGML_Q4_0,
    I32,
    STRING,
    U8,
    U32,
    Gguf,
    array,
    entry,
    key,
    nested,
    safetensors,
    string,
    tensor,
)

from offload.units import MIB

HUGE = 2**60
ARCHITECTURE = key("general.architecture", STRING, "llama")
F32_8 = entry("F32", [8], 0, 32)


def _keys(*keys: bytes, count: int | None = None) -> bytes:
    return Gguf(keys=(ARCHITECTURE, *keys), num_keys=count).build()


def _tensors(*tensors: bytes, data: int = 64, count: int | None = None) -> bytes:
    return Gguf(tensors=tensors, data=bytes(data), num_tensors=count).build()


GGUF = {
    "empty file": (b"", "needs 4 bytes"),
    "wrong magic": (Gguf(magic=b"GGML").build(), "starts with b'GGML'"),
    "zip file": (b"PK\x03\x04" + bytes(60), "starts with b'PK"),
    "version 1": (Gguf(version=1).build(), "GGUF version 1"),
    "version 99": (Gguf(version=99).build(), "GGUF version 99"),
    "big endian": (Gguf(version=3 << 24).build(), "big-endian"),
    "2^60 keys": (Gguf(num_keys=HUGE).build(), f"{HUGE} key-values cannot fit"),
    "2^64-1 keys": (Gguf(num_keys=2**64 - 1).build(), "key-values cannot fit"),
    "2^60 tensors": (Gguf(num_tensors=HUGE).build(), f"{HUGE} tensors cannot fit"),
    "one key too many": (_keys(count=2), "key 1: name of 0 bytes"),
    "key of 2^60 bytes": (Gguf(keys=(struct.pack("<QI", HUGE, U8),)).build(), f"name of {HUGE} bytes"),
    "empty key": (_keys(key("", U8, 1)), "name of 0 bytes"),
    "key not UTF-8": (_keys(key(b"\xff\xfe", U8, 1)), "not UTF-8"),
    "duplicate key": (_keys(key("a.b", U8, 1), key("a.b", U8, 2)), "'a.b' appears twice"),
    "value type 13": (_keys(string("a.b") + struct.pack("<IQ", 13, 0)), "value type 13"),
    "array of type 99": (_keys(string("a.b") + struct.pack("<IIQ", ARRAY, 99, 1) + bytes(8)), "value type 99"),
    "string of 2^60 bytes": (_keys(string("a.b") + struct.pack("<IQ", STRING, HUGE)), f"string of {HUGE} bytes"),
    "string of 2^64-1 bytes": (_keys(string("a.b") + struct.pack("<IQ", STRING, 2**64 - 1)), "string of"),
    "65 bytes, 2^30-1 strings": (
        Gguf(keys=(array("a.b", STRING, [], count=2**30 - 1) + bytes(22),)).build()[:65],
        f"{2**30 - 1} elements",
    ),
    "2^60 numbers": (_keys(array("a.b", I32, [], count=HUGE)), f"{HUGE} elements"),
    "2^64-1 bytes": (_keys(array("a.b", U8, [], count=2**64 - 1)), "elements"),
    "string in a long array past the end": (
        _keys(array("a.b", STRING, ["x"] * 2000)[:-9] + struct.pack("<Q", HUGE) + b"x"),
        f"'a.b'[1999]: string of {HUGE} bytes",
    ),
    "long array ends in a length": (
        Gguf(keys=(array("a.b", STRING, ["xyz"] * 2000)[:-5],), alignment=1).build(),
        "'a.b'[1999]: needs 8 bytes",
    ),
    "truth value 2": (_keys(string("a.b") + struct.pack("<IB", BOOL, 2)), "truth value 2"),
    "truth value 2 in an array": (_keys(string("a.b") + struct.pack("<IIQB", ARRAY, BOOL, 1, 2)), "truth value 2"),
    "arrays 5 deep": (_keys(nested("a.b", 4)), "nested deeper than 4"),
    "arrays 10,000 deep": (_keys(nested("a.b", 10_000)), "nested deeper than 4"),
    "alignment 0": (_keys(key("general.alignment", U32, 0)), "general.alignment is 0"),
    "alignment 33": (_keys(key("general.alignment", U32, 33)), "general.alignment is 33"),
    "alignment 2^31": (_keys(key("general.alignment", U32, 2**31)), "general.alignment is 2147483648"),
    "alignment is text": (_keys(key("general.alignment", STRING, "32")), "general.alignment is '32'"),
    "alignment is a fraction": (_keys(key("general.alignment", F32, 32.0)), "general.alignment is 32.0"),
    "alignment is a list": (_keys(array("general.alignment", U32, [32] * 5000)), "general.alignment is array("),
    "no architecture": (Gguf(keys=()).build(), "general.architecture is missing"),
    "architecture is a number": (Gguf(keys=(key("general.architecture", U8, 1),)).build(), "general.architecture is"),
    "tensor name of 2^60 bytes": (_tensors(struct.pack("<Q", HUGE) + bytes(25)), f"name of {HUGE} bytes"),
    "0 dimensions": (_tensors(tensor("t", []) + bytes(8)), "tensor 't': 0 dimensions"),
    "2^32-1 dimensions": (_tensors(string("t") + struct.pack("<I", 2**32 - 1) + bytes(40)), "4294967295 dimensions"),
    "dimension 0": (_tensors(tensor("t", [8, 0])), "empty dimension"),
    "product overflows 64 bits": (_tensors(tensor("t", [2**32, 2**32, 2, 2])), "the whole file has"),
    "product wraps to 0": (_tensors(tensor("t", [2**62, 4])), "the whole file has"),
    "not-a-number bits as a dimension": (_tensors(tensor("t", [0x7FF8000000000000])), "the whole file has"),
    "half a block in a row": (_tensors(tensor("t", [48], GGML_Q4_0)), "stores 32 at a time"),
    "element type 4 (removed)": (_tensors(tensor("t", [8], 4)), "element type 4"),
    "element type 2^32-1": (_tensors(tensor("t", [8], 2**32 - 1)), "element type 4294967295"),
    "offset not aligned": (_tensors(tensor("t", [4], GGML_F32, 4)), "offset 4 is no multiple of the alignment 32"),
    "offset past the end": (_tensors(tensor("t", [8], GGML_F32, 64)), "tensor 't': bytes"),
    "offset 2^64-32": (_tensors(tensor("t", [8], GGML_F32, 2**64 - 32)), "tensor 't': bytes"),
    "data cut short": (_tensors(tensor("t", [8]), data=31), "tensor 't': bytes"),
    "duplicate tensor": (_tensors(tensor("t", [8]), tensor("t", [8], offset=32)), "'t' appears twice"),
    "two tensors in one place": (_tensors(tensor("t", [8]), tensor("u", [8])), "overlap"),
    "tensors overlap": (_tensors(tensor("u", [1], offset=32), tensor("t", [16])), "overlap"),
    "escape codes in a name": (_tensors(tensor("\x1b[2J\u202e", [8], 4)), r"tensor '\x1b[2J\u202e': element type 4"),
    "lone part of a split": (_keys(key("split.no", U32, 0), key("split.count", U32, 2)), "split.count 2"),
}

SAFETENSORS = {
    "empty file": (b"", "needs 8 bytes"),
    "five bytes": (b"\x01\0\0\0\0", "needs 8 bytes"),
    "header of 2^60 bytes": (safetensors({}, length=HUGE), f"header of {HUGE} bytes"),
    "header of 2^64-1 bytes": (safetensors({}, length=2**64 - 1), "header of 18446744073709551615 bytes"),
    "header one byte too long": (safetensors({}, length=3), "header of 3 bytes, 2 left"),
    "empty header": (safetensors(b""), "header starts with b''"),
    "GGUF file": (Gguf().build().ljust(64, b"\0"), "header of"),
    "header is a list": (safetensors(b"[]"), "header starts with b'['"),
    "header starts with a space": (safetensors(b" {}"), "header starts with b' '"),
    "not JSON": (safetensors(b"{nope}"), "bad JSON"),
    "not UTF-8": (safetensors(b'{"\xff\xff":1}'), "bad JSON"),
    "text after the object": (safetensors(b"{}{}"), "bad JSON"),
    "open string": (safetensors(b'{"abc'), "bad JSON"),
    "100,000 brackets": (safetensors(b'{"a":' + b"[" * 100_000), "nested deeper than 32"),
    "100,000 objects": (safetensors(b'{"a":' * 100_000), "nested deeper than 32"),
    "brackets behind escaped quotes": (safetensors(b'{"a\\"":' + b"[" * 100_000), "nested deeper than 32"),
    "number of a million digits": (safetensors(b'{"a":' + b"9" * 1_000_000 + b"}"), "number of 1000000 digits"),
    "duplicate tensor": (
        safetensors('{"t":%s,"t":%s}' % ((str(F32_8).replace("'", '"'),) * 2), bytes(32)),
        "'t' appears twice",
    ),
    "duplicate dtype": (
        safetensors('{"t":{"dtype":"F32","dtype":"F16","shape":[8],"data_offsets":[0,32]}}', bytes(32)),
        "'dtype' appears twice",
    ),
    "entry is a number": (safetensors({"t": 1}), "tensor 't': expected exactly"),
    "entry lacks shape": (safetensors({"t": {"dtype": "F32", "data_offsets": [0, 4]}}), "tensor 't': expected exactly"),
    "entry has more": (safetensors({"t": {**F32_8, "x": 1}}, bytes(32)), "tensor 't': expected exactly"),
    "unknown dtype": (safetensors({"t": entry("F33", [8], 0, 32)}, bytes(32)), "unknown dtype 'F33'"),
    "dtype is a list": (safetensors({"t": {**F32_8, "dtype": ["F32"]}}, bytes(32)), "unknown dtype"),
    "negative dimension": (safetensors({"t": entry("F32", [-8], 0, 32)}, bytes(32)), "sizes of zero or more"),
    "two negative dimensions": (safetensors({"t": entry("F32", [-8, -1], 0, 32)}, bytes(32)), "sizes of zero or more"),
    "fractional dimension": (safetensors({"t": entry("F32", [8.0], 0, 32)}, bytes(32)), "sizes of zero or more"),
    "dimension is true": (safetensors({"t": entry("F32", [8, True], 0, 32)}, bytes(32)), "sizes of zero or more"),
    "dimension is NaN": (safetensors('{"t":{"dtype":"F32","shape":[NaN],"data_offsets":[0,32]}}', bytes(32)), "sizes"),
    "dimension is 1e999": (safetensors('{"t":{"dtype":"F32","shape":[1e999],"data_offsets":[0,32]}}'), "sizes"),
    "nine dimensions": (safetensors({"t": entry("F32", [1] * 8 + [8], 0, 32)}, bytes(32)), "up to 8"),
    "product overflows": (safetensors({"t": entry("F32", [2**62, 2**62], 0, 32)}, bytes(32)), "needs"),
    "one offset": (safetensors({"t": {**F32_8, "data_offsets": [0]}}, bytes(32)), "expected two positions"),
    "negative offset": (safetensors({"t": entry("F32", [8], -32, 0)}, bytes(32)), "expected two positions"),
    "offsets reversed": (safetensors({"t": entry("F32", [8], 32, 0)}, bytes(32)), "needs 32 bytes"),
    "size does not match": (safetensors({"t": entry("F32", [8], 0, 28)}, bytes(28)), "needs 32 bytes"),
    "truncated data": (safetensors({"t": F32_8}, bytes(31)), "ends at data byte 32, the file has 31"),
    "trailing bytes": (safetensors({"t": F32_8}, bytes(33)), "1 bytes follow the last tensor"),
    "hole in front": (safetensors({"t": entry("F32", [8], 8, 40)}, bytes(40)), "leave a hole"),
    "hole between": (safetensors({"t": F32_8, "u": entry("F32", [1], 36, 40)}, bytes(40)), "leave a hole"),
    "overlap": (safetensors({"t": F32_8, "u": entry("F32", [2], 28, 36)}, bytes(36)), "overlap"),
    "two tensors in one place": (safetensors({"t": F32_8, "u": F32_8}, bytes(32)), "overlap"),
    "end 2^60": (safetensors({"t": entry("I8", [HUGE], 0, HUGE)}, bytes(32)), f"ends at data byte {HUGE}"),
    "metadata is a number": (safetensors({"__metadata__": 1}), "__metadata__"),
    "metadata holds a list": (safetensors({"__metadata__": {"a": []}}), "__metadata__"),
    "weight in 8-bit floats": (safetensors({"t": entry("F8_E5M2", [8], 0, 8)}, bytes(8)), "dtype F8_E5M2"),
    "weight in packed bytes": (safetensors({"a.weight": entry("U8", [8], 0, 8)}, bytes(8)), "dtype U8"),
}


def _long(code: int, count: int) -> bytes:
    """Head of a GGUF whose only other key is an array; the file is then extended with zeros."""
    head = string("a.b") + struct.pack("<IIQ", ARRAY, code, count)
    return Gguf(keys=(key("general.architecture", STRING, "llama"), head), alignment=1).build()


# suffix, bytes, size that the file is extended to with zeros, whether it opens
LARGE = {
    "3 million empty strings": (".gguf", _long(STRING, 3_000_000), 40 * MIB, False),
    "2.6 million empty strings": (".gguf", _long(STRING, 2_600_000), 40 * MIB, True),
    "23 MiB of numbers": (".gguf", _long(U8, 23 * MIB), 40 * MIB, True),
    "31 MiB of numbers": (".gguf", _long(U8, 31 * MIB), 40 * MIB, False),
    "4 GiB of numbers": (".gguf", _long(U8, 4096 * MIB), 5000 * MIB, False),
    "an empty array of arrays, a million times": (".gguf", _long(ARRAY, 1_000_000), 40 * MIB, False),
    "a string of 5 MiB": (
        ".gguf",
        Gguf(
            keys=(
                key("general.architecture", STRING, "llama"),
                key("a.b", STRING, "\U0001f600".encode() + bytes(5 * MIB)),
            )
        ).build(),
        None,
        True,
    ),
    "a string of 12 MiB": (
        ".gguf",
        Gguf(keys=(key("general.architecture", STRING, "llama"), key("a.b", STRING, bytes(12 * MIB)))).build(),
        None,
        False,
    ),
    "35,000 tensors": (
        ".gguf",
        Gguf(
            tensors=tuple(tensor(f"tensor number {i}", [1], 0, 32 * i) for i in range(35_000)), data=bytes(35_000 * 32)
        ).build(),
        None,
        True,
    ),
    "80,000 tensors": (
        ".gguf",
        Gguf(tensors=tuple(tensor(f"{i}", [1], 0, 32 * i) for i in range(80_000)), data=bytes(80_000 * 32)).build(),
        None,
        False,
    ),
    "400 tensors with names of 64 KiB": (
        ".gguf",
        Gguf(
            tensors=tuple(tensor(f"\U0001f600{i:0>65000}", [1], 0, 32 * i) for i in range(400)), data=bytes(400 * 32)
        ).build(),
        None,
        False,
    ),
    "50,000 keys": (
        ".gguf",
        Gguf(keys=tuple(key(f"{i}", U8, 0) for i in range(50_000))).build(),
        None,
        False,
    ),
    "100,000 keys": (
        ".gguf",
        Gguf(keys=tuple(key(f"{i}", U8, 0) for i in range(100_000))).build(),
        None,
        False,
    ),
    "17,000 tensors in JSON": (
        ".safetensors",
        safetensors({f"tensor number {i}": entry("F32", [1], 4 * i, 4 * i + 4) for i in range(17_000)}, bytes(68_000)),
        None,
        True,
    ),
    "30,000 tensors in JSON": (
        ".safetensors",
        safetensors({f"{i}": entry("F32", [1], 4 * i, 4 * i + 4) for i in range(30_000)}, bytes(120_000)),
        None,
        False,
    ),
    "99,000 empty lists": (".safetensors", safetensors(b'{"a":[' + b"[]," * 99_000 + b"[]]}"), None, False),
    "3 million commas": (".safetensors", safetensors(b'{"a":[' + b"0," * 3_000_000 + b"0]}"), None, False),
    "149,000 keys": (
        ".safetensors",
        safetensors(b"{" + b",".join(b'"%045d":0' % i for i in range(149_000)) + b"}"),
        None,
        False,
    ),
    "8 MiB of text": (".safetensors", safetensors(b'{"a":"' + b"x" * (8 * MIB - 8) + b'"}'), None, False),
    "8 MiB of escapes": (
        ".safetensors",
        safetensors(b'{"a":"' + b"\\\\" * (4 * MIB - 8) + b'"}'),
        None,
        False,
    ),
    "8 MiB of quotes": (".safetensors", safetensors(b"{" + b'"' * (8 * MIB - 8) + b"}"), None, False),
    "3 MiB with a rare character": (
        ".safetensors",
        safetensors(b'{"a":"\xf0\x9f\x98\x80' + b"x" * (3 * MIB) + b'"}'),
        None,
        False,
    ),
    "header of 1 GiB": (".safetensors", safetensors(b"{", length=1024 * MIB), 1025 * MIB, False),
}


def write(folder: Path, suffix: str, data: bytes, *, size: int | None = None) -> Path:
    path = folder / f"model{suffix}"
    path.write_bytes(data)
    if size is not None:
        with path.open("r+b") as file:
            file.truncate(size)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return path
