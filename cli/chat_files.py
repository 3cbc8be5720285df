"""Saved chats and the history of typed lines: files that are readable whenever the program is killed.

A chat is written beside its place, synced, and renamed over it: the place holds the old chat or the new one, never half.
Files are for their owner's eyes only (mode 0600).
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

from platformdirs import user_data_path, user_state_path

from offload.cli.text import user_path
from offload.errors import CheckpointError, StorageError, UsageError
from offload.writing import PRIVATE, beside

Messages = list[dict[str, str]]
FORMAT: Final = "offload-chat-1"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LARGEST_CHAT: Final = 64 * 1024**2


def chat_path(name: str) -> Path:
    """Where the chat `name` lies: a plain word in the user's data folder, anything with a separator as a path.

    Raises:
        UsageError: empty, or neither a word nor a path.
    """
    if "/" in name or os.sep in name or name.startswith("~"):
        return user_path(name)
    if not _NAME.fullmatch(name):
        raise UsageError(f"chat name {name!r}: use letters, digits, dots and dashes, or a path with a slash")
    return _chats_folder() / f"{name}.json"


def _chats_folder() -> Path:
    return user_data_path("offload") / "chats"


def history_path() -> Path:
    """The file of typed lines, created empty and private when it is missing.

    Raises:
        OSError: the folder cannot be made or the file cannot be opened.
    """
    path = user_state_path("offload") / "history"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    path.chmod(0o600)
    return path


def save_chat(path: Path, messages: Messages, *, model: str, options: dict[str, Any]) -> None:
    """Write a chat. On return it is on the disk; on an error the earlier file is untouched.

    A symlink is followed and stays. The folder of named chats is made when it is missing, any other must exist.

    Raises:
        UsageError: no such folder, or something that is no saved chat lies there.
        StorageError: no space, no permission, an I/O error.
    """
    chat = {"format": FORMAT, "model": model, "messages": messages, "options": options}
    try:
        if path.parent == _chats_folder():
            path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(chat, ensure_ascii=False, indent=1)
        # UTF-8 has no place for a lone surrogate, whose backslash escape is also that of JSON
        write_private(_regular_place(path), text.encode(errors="backslashreplace"))
    except OSError as error:
        raise StorageError(
            f"cannot save the chat to {path}: {error.strerror}", path=str(path), errno=error.errno
        ) from error


def _regular_place(path: Path) -> Path:
    place = Path(os.path.realpath(path))  # a rename over a symlink would replace the link and not its target
    if not place.parent.is_dir():
        raise UsageError(f"cannot save the chat to {path}: no such folder {place.parent}")
    if os.path.lexists(place) and not stat.S_ISREG(place.lstat().st_mode):
        raise UsageError(f"cannot save the chat to {path}: it is not a regular file; choose another place")
    if place.exists() and place.stat().st_size:
        try:
            load_chat(place)
        except CheckpointError:
            raise UsageError(
                f"cannot save the chat to {path}: the file is there and is no saved chat; choose another name"
            ) from None
    return place


def load_chat(path: Path) -> tuple[Messages, dict[str, Any]]:
    """Messages and options of a saved chat.

    Raises:
        UsageError: no such file.
        CheckpointError: not a chat that `save_chat` wrote.
        StorageError: it cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a device or a pipe may never end
            raise CheckpointError(f"{path}: not a saved chat (not a regular file)", path=str(path))
        if status.st_size > _LARGEST_CHAT:
            raise CheckpointError(f"{path}: larger than any chat (limit 64 MiB)", path=str(path))
        chat = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such chat") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", path=str(path), errno=error.errno) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a saved chat (no valid JSON)", path=str(path)) from error
    if not _is_chat(chat):
        raise CheckpointError(f"{path}: not a saved chat (expected format {FORMAT!r} and messages)", path=str(path))
    return chat["messages"], chat.get("options", {})


def _is_chat(chat: Any) -> bool:
    if not isinstance(chat, dict) or chat.get("format") != FORMAT or not isinstance(chat.get("messages"), list):
        return False
    well_formed = all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(v, str) for v in message.values())
        for message in chat["messages"]
    )
    return well_formed and isinstance(chat.get("options", {}), dict)


def write_private(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically and durably, for its owner only."""
    with beside(path, mode=PRIVATE) as temporary:
        temporary.write_bytes(content)
