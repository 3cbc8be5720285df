"""JSON from untrusted files: bounded in size, depth, tokens and number length before the parser allocates anything.

Knows the grammar of JSON only; what an object means is its reader's business.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from offload.errors import CheckpointError
from offload.models.checkpoint.reader import DAMAGED, HeaderReader, quote
from offload.units import MIB

MAX_TEXT_BYTES: Final = 8 * MIB  # the index of a trillion-parameter model has 7
_MAX_DEPTH: Final = 32
_MAX_TOKENS: Final = 300_000  # strings, brackets and commas: 100,000 entries of an index, 17,000 tensors of a header
_MAX_DIGITS: Final = 40
_TOKEN: Final = re.compile(rb'"[^"]*"|["\[\]{},]')
_DEPTH_CHANGE: Final = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


def read_json_object(path: Path) -> tuple[dict[str, object], bytes]:
    """The object in a JSON file, and a digest of the file.

    Raises:
        CheckpointError: missing, too large, too deep, not JSON, not an object, or with a key twice in one object.
    """
    with HeaderReader(path, limit_bytes=MAX_TEXT_BYTES) as reader:
        data = reader.take(reader.size, "JSON text")
        digest = reader.finish(keep=0)
    return parse_json_object(data, path), digest


def parse_json_object(data: bytes, path: Path) -> dict[str, object]:
    """The object that `data` spells, with the bounds of this module; `path` is named in errors.

    Raises:
        CheckpointError: as `read_json_object`.
    """
    try:
        _check_bounds(data)
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_int=_bounded_int)
    except ValueError as error:
        raise CheckpointError(f"{path}: bad JSON: {error}; {DAMAGED}", path=str(path)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: JSON {type(value).__name__}, expected an object; {DAMAGED}", path=str(path))
    return value


def _check_bounds(data: bytes) -> None:
    """Walk over the brackets outside of strings; malformed text may pass, the parser finds it."""
    decoded_bytes = len(data) * (1 if data.isascii() else 4)  # one rare character makes all of them 4 bytes wide
    if decoded_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"{decoded_bytes} bytes once decoded, at most {MAX_TEXT_BYTES} are read")
    depth = 0
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in data else data
    for count, match in enumerate(_TOKEN.finditer(bare)):
        depth += _DEPTH_CHANGE.get(match[0], 0)
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DEPTH}")
        if count >= _MAX_TOKENS:
            raise ValueError(f"more than {_MAX_TOKENS} strings, brackets and commas")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    items: dict[str, object] = {}
    for key, value in pairs:
        if key in items:
            raise ValueError(f"key {quote(key)} appears twice")
        items[key] = value
    return items


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"number of {len(digits)} digits")
    return int(digits)
