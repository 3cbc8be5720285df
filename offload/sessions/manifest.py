"""A session as a file: checked when it is read, whoever wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from offload.sessions.chain import Reference
from offload.sessions.geometry import MAX_CAPACITY, Ids
from offload.sessions.record import SEGMENT_ID
from offload.sessions.sealed import BrokenFile, packed, read_small, seal, text, unpacked, unseal, whole
from offload.units import MIB

KIND: Final = "offload-session"
VERSION: Final = 1
MAX_NBYTES: Final = 64 * MIB  # a million tokens, and their text, take twelve
MAX_TOKENS: Final = 1 << 23
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_REVISION: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """A saved conversation.

    Attributes:
        model: its name, for people. fingerprint: of its checkpoint, which tokens and rows belong to.
        tokens: of the whole conversation, as the model saw them. messages: the same for people and templates.
        references: the segments that hold its rows; they are evicted last.
        created, updated: ISO 8601, UTC; set when it is saved.
        revision: which save this is; nothing before the first.
    """

    name: str
    model: str
    fingerprint: str
    tokens: Ids = field(default_factory=lambda: np.empty(0, "<i4"))
    messages: tuple[Mapping[str, str], ...] = ()
    references: tuple[Reference, ...] = ()
    created: str = ""
    updated: str = ""
    revision: str = ""


def encode(session: Session) -> bytes:
    """The bytes of a session's file."""
    fields = {name: getattr(session, name) for name in ("model", "fingerprint", "created", "updated", "revision")}
    messages = [dict(message) for message in session.messages]
    return seal(
        KIND,
        VERSION,
        {**fields, "messages": messages, "references": session.references, "tokens": packed(session.tokens)},
    )


def read_session(path: Path) -> Session:
    """The session in a file, which is named after it.

    Raises:
        BrokenFile: it is no session, or says what cannot be. OSError: it cannot be read.
    """
    fields = unseal(KIND, VERSION, read_small(path, MAX_NBYTES))
    times = [text(fields, "created"), text(fields, "updated")]
    if not all(map(_TIME.fullmatch, times)) or not _REVISION.fullmatch(text(fields, "revision")):
        raise BrokenFile("its times or its revision are none")
    return Session(
        name=path.stem,
        model=text(fields, "model"),
        fingerprint=text(fields, "fingerprint"),
        tokens=unpacked(fields.get("tokens"), MAX_TOKENS),
        messages=_messages(fields.get("messages")),
        references=_references(fields.get("references")),
        created=times[0],
        updated=times[1],
        revision=fields["revision"],
    )


def is_message(message: object) -> bool:
    """Whether it has a role and a content, and nothing else."""
    return (
        isinstance(message, Mapping)
        and message.keys() == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
    )


def _messages(listed: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(listed, list) or not all(map(is_message, listed)):
        raise BrokenFile("messages are not all a role and a content")
    return tuple(listed)


def _references(listed: Any) -> tuple[Reference, ...]:
    if not isinstance(listed, list):
        raise BrokenFile("references are no list")
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise BrokenFile("a reference is no pair")
        if not SEGMENT_ID.fullmatch(entry[0]):
            raise BrokenFile("a reference to no segment")
        whole({"rows": entry[1]}, "rows", MAX_CAPACITY)
    return tuple(Reference(*entry) for entry in listed)
