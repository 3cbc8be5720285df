"""Small files of JSON under a line that names their kind, their version and a checksum: read whole, or refused in one line.

    offload-session 1 0123456789abcdef
    {"model": ...}

Text that people can rescue with an editor, in which a damaged byte cannot pass for another token. Tokens are base64.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from xxhash import xxh3_64_hexdigest

from offload.sessions.geometry import Ids
from offload.tiers.files import OPEN_FLAGS
from offload.writing import PRIVATE, beside

NO_FOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
_HEAD_BYTES: Final = 128


class BrokenFile(Exception):
    """Why a file cannot be believed; `newer` where only a later version of this program can tell."""

    def __init__(self, reason: str, *, newer: bool = False) -> None:
        super().__init__(reason)
        self.newer = newer


def seal(kind: str, version: int, fields: Mapping[str, object]) -> bytes:
    """The bytes of a file."""
    text = json.dumps(fields, ensure_ascii=False, indent=1)
    # UTF-8 has no place for a lone surrogate, whose backslash escape is also that of JSON
    body = text.encode(errors="backslashreplace") + b"\n"
    return f"{kind} {version} {xxh3_64_hexdigest(body)}\n".encode() + body


def unseal(kind: str, version: int, data: bytes) -> dict[str, Any]:
    """What was sealed.

    Raises:
        BrokenFile: it is something else, of another version, or damaged.
    """
    head, _, body = data.partition(b"\n")
    words = head[:_HEAD_BYTES].split(b" ")
    if len(words) != 3 or words[0] != kind.encode():
        raise BrokenFile(f"starts with {data[:16]!r}, expected {kind!r}")
    if words[1] != str(version).encode():
        raise BrokenFile(f"version {words[1][:16]!r}, this program reads {version}", newer=True)
    if words[2] != xxh3_64_hexdigest(body).encode():
        raise BrokenFile("damaged: its checksum does not match")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise BrokenFile("no valid JSON") from None
    if not isinstance(fields, dict):
        raise BrokenFile("no JSON object")
    return fields


def read_small(path: Path, most: int) -> bytes:
    """The bytes of a regular file that is no longer than `most`.

    Raises:
        BrokenFile: longer, a link, or nothing regular. OSError: it cannot be read; FileNotFoundError when there is none.
    """
    if path.is_symlink():
        raise BrokenFile("a symbolic link, expected a regular file")
    with open(os.open(path, OPEN_FLAGS | NO_FOLLOW), "rb", buffering=0) as file:  # noqa: PTH123 - of a descriptor
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BrokenFile("not a regular file")
        if status.st_size > most:
            raise BrokenFile(f"{status.st_size} bytes, at most {most} expected")
        return file.readall() or b""


def write_sealed(path: Path, data: bytes) -> None:
    """Replaces a file in one step, durably, for its owner only.

    Raises:
        OSError: it cannot be written; what was there may have been replaced by then, never by a part of the new bytes.
    """
    with beside(path, mode=PRIVATE) as temporary:
        temporary.write_bytes(data)


def packed(ids: Ids) -> str:
    """Tokens as text."""
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def unpacked(text: object, most: int) -> Ids:
    """The tokens in a text, at most so many.

    Raises:
        BrokenFile: they are none, or too many.
    """
    if not isinstance(text, str) or len(text) > 6 * most + 8:
        raise BrokenFile(f"tokens are no text, or more than {most}")
    try:
        ids = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
    except (binascii.Error, ValueError):
        raise BrokenFile("tokens are no base64 of numbers") from None
    if len(ids) > most or (ids.size and ids.min() < 0):
        raise BrokenFile(f"tokens below zero, or more than {most}")
    return ids


def whole(fields: Mapping[str, Any], name: str, most: int) -> int:
    """A number from 0 to `most`.

    Raises:
        BrokenFile: it is none.
    """
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise BrokenFile(f"{name}={str(value)[:40]!r}: no whole number from 0 to {most}")
    return value


def text(fields: Mapping[str, Any], name: str) -> str:
    """
    Raises:
        BrokenFile: it is no text.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        raise BrokenFile(f"{name} is no text")
    return value
