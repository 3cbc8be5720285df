"""The bytes that a token stands for, from the way a vocabulary spells it. Pure functions; knows no tokenizer library.

byte_level      GPT-2: every byte is one printable character ("Ġ" is a space)
sentencepiece   "▁" is a space, <0x0A> is one byte, the rest is itself
plain           the token is its text
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final, Literal

PieceKind = Literal["byte_level", "sentencepiece", "plain"]

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_bytes(piece: str, kind: PieceKind) -> bytes:
    """Bytes of one vocabulary entry that is not an added token."""
    if kind == "byte_level":
        table = byte_of_character()
        return b"".join(table.get(character, character.encode()) for character in piece)
    if kind == "sentencepiece":
        match = _BYTE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()
    return piece.encode()


@cache
def byte_of_character() -> dict[str, bytes]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the 68 other bytes follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}
