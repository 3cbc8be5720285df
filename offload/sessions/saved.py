"""Sessions by name, one file each. A file is replaced in one step: a session is what was last saved, or what was before.

Only the messages, the tokens and references to rows are here. A session whose rows are gone is whole; its tokens are
computed again. Processes on one folder take turns, for as long as a file takes to write; a save over something that another
has saved meanwhile is refused, lest a turn be lost.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from offload.errors import CheckpointError, StorageError, UsageError
from offload.sessions.geometry import token_ids
from offload.sessions.locking import waiting_for
from offload.sessions.manifest import MAX_NBYTES, MAX_TOKENS, Session, encode, is_message, read_session
from offload.sessions.sealed import BrokenFile, write_sealed
from offload.units import format_size

SUFFIX: Final = ".session"
NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_LOCK: Final = ".lock"
_LOCK_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A line of a list. Where `problem` says why the session cannot be read, only its name is known."""

    name: str
    model: str = ""
    fingerprint: str = ""
    updated: str = ""
    num_tokens: int = 0
    num_messages: int = 0
    problem: str = ""


class Sessions:
    """See the module. Any thread may call; names are the same in upper and lower case, as files are on some systems.

    Raises:
        StorageError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tried: dict[str, str] = {}
        self._seen: dict[str, tuple[tuple[int, ...], frozenset[str]]] = {}
        with self._reported("be opened"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._taking_turns("be opened"):
            for partial in folder.glob(f".*{SUFFIX}.*.partial"):  # of killed writers: whoever writes holds the lock
                partial.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """All names, in order.

        Raises:
            StorageError: the folder cannot be read.
        """
        with self._reported("be listed"):
            stems = [path.stem for path in self.folder.iterdir() if path.suffix == SUFFIX]
        return sorted(name for name in stems if NAME.fullmatch(name))

    def list(self) -> list[Summary]:
        """What can be said of each, the last one used first.

        Raises:
            StorageError: the folder cannot be read.
        """
        return sorted(map(self._summary, self.names()), key=lambda summary: summary.updated, reverse=True)

    def load(self, name: str) -> Session:
        """
        Raises:
            UsageError: there is none of this name. CheckpointError: its file is damaged. StorageError: it cannot be read.
        """
        path = self._path(self._known(name))
        with self._reported("be read", path):
            return read_session(path)

    def save(self, session: Session) -> Session:
        """Writes a session; durable on return. Returns it as saved, which is what the next save takes.

        Raises:
            UsageError: the name cannot be one, a new session has the name of another, or this one has been saved by
                another process since it was loaded.
            StorageError: it cannot be written. What is saved is then this or what was before.
        """
        session = _checked(session)
        path = self._path(session.name)
        with self._taking_turns("be saved", path):
            self._check_revision(session)
            return self._write(session)

    def fork(self, name: str, new: str) -> Session:
        """A session of its own with what another one holds; rows are shared.

        Raises:
            UsageError: no such session, or the new name is taken or cannot be one. Others: as `load` and `save`.
        """
        return self.save(replace(self.load(name), name=new, created="", revision=""))

    def rename(self, name: str, new: str) -> None:
        """
        Raises:
            UsageError: no such session, or the new name is taken or cannot be one. StorageError: it cannot be renamed.
        """
        _check_name(new)
        with self._taking_turns("be renamed"):
            old = self._known(name)
            if new.casefold() != old.casefold():
                self._check_free(new)
            self._path(old).replace(self._path(new))

    def delete(self, name: str) -> None:
        """Its rows go when their room is needed.

        Raises:
            UsageError: no such session. StorageError: it cannot be removed.
        """
        with self._taking_turns("be removed"):
            self._path(self._known(name)).unlink()

    def segments(self) -> frozenset[str]:
        """Ids of all segments that saved sessions refer to.

        Raises:
            StorageError: the folder cannot be read.
        """
        seen = {}
        for name in self.names():
            with suppress(OSError, BrokenFile):
                path = self._path(name)
                status = path.lstat()
                key = (status.st_ino, status.st_size, status.st_mtime_ns)
                known = self._seen.get(name)
                if known is None or known[0] != key:
                    known = key, frozenset(reference.segment for reference in read_session(path).references)
                seen[name] = known
        self._seen = seen
        return frozenset().union(*(segments for _, segments in seen.values()))

    def _write(self, session: Session) -> Session:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        revision = secrets.token_hex(8)
        saved = replace(session, created=session.created or now, updated=now, revision=revision)
        data = encode(saved)
        if len(data) > MAX_NBYTES:
            raise UsageError(
                f"session {session.name!r}: {format_size(len(data))}, at most {format_size(MAX_NBYTES)} can be saved; "
                "begin a new one"
            )
        self._tried[session.name] = revision
        write_sealed(self._path(session.name), data)
        return saved

    def _check_revision(self, session: Session) -> None:
        """
        Raises:
            UsageError: what is on disk is not what the session was loaded from.
        """
        if not session.revision:
            self._check_free(session.name)
            return
        try:
            on_disk = read_session(self._path(session.name)).revision
        except (FileNotFoundError, BrokenFile):
            return  # nothing is lost by writing it
        if on_disk not in (session.revision, self._tried.get(session.name)):
            raise UsageError(
                f"session {session.name!r}: another process has saved it meanwhile; save under another name"
            )

    def _check_free(self, name: str) -> None:
        """
        Raises:
            UsageError: a session has this name.
        """
        taken = self._nearest(name)
        if taken is not None:
            raise UsageError(f"session {taken!r} exists; choose another name or delete it")

    def _known(self, name: str) -> str:
        """A session's name as it is written.

        Raises:
            UsageError: there is none.
        """
        names = self.names()
        found = self._nearest(name)
        if found is None:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {len(names)}"
            raise UsageError(f"no session {name!r}; {hint}")
        return found

    def _nearest(self, name: str) -> str | None:
        return next((known for known in self.names() if known.casefold() == name.casefold()), None)

    def _summary(self, name: str) -> Summary:
        try:
            session = self.load(name)
        except (CheckpointError, StorageError, UsageError) as error:
            return Summary(name=name, problem=str(error))
        return Summary(
            name=name,
            model=session.model,
            fingerprint=session.fingerprint,
            updated=session.updated,
            num_tokens=len(session.tokens),
            num_messages=len(session.messages),
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    @contextmanager
    def _taking_turns(self, what: str, path: Path | None = None) -> Iterator[None]:
        with self._reported(what, path), waiting_for(self.folder / _LOCK, _LOCK_TIMEOUT_S):
            yield

    @contextmanager
    def _reported(self, what: str, path: Path | None = None) -> Iterator[None]:
        """
        Raises:
            StorageError: instead of OSError. CheckpointError: instead of BrokenFile.
        """
        place = path or self.folder
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"session {place} cannot {what}: {error.strerror or error}; check the disk's space and permissions",
                path=str(place),
                errno=error.errno,
            ) from error
        except BrokenFile as error:
            raise CheckpointError(f"session {place}: {error}; delete it or restore a copy", path=str(place)) from None


def _check_name(name: str) -> None:
    """
    Raises:
        UsageError: it cannot be a name.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"session name {name!r}: use up to 64 letters, digits, dots, dashes and underscores")


def _checked(session: Session) -> Session:
    """The session, its tokens as numbers of 32 bits.

    Raises:
        UsageError: what it holds could not be read back.
    """
    _check_name(session.name)
    tokens = token_ids(session.tokens)
    if len(tokens) > MAX_TOKENS:
        raise UsageError(f"session {session.name!r}: {len(tokens)} tokens, at most {MAX_TOKENS} can be saved")
    if not all(map(is_message, session.messages)):
        raise UsageError(f"session {session.name!r}: a message has exactly a role and a content, both text")
    return replace(session, tokens=tokens)
