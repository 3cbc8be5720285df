"""Where the user's lines come from: an editing prompt on a terminal, plain lines from a pipe.

Both join what stands between triple quotes into one message. Neither knows commands nor engines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from offload.errors import UsageError
from offload.models.text.bounds import MAX_TEXT_BYTES
from offload.units import format_size

QUOTES: Final = '"""'
LEAVE_HINT: Final = "To leave: Ctrl-D, or /bye"


class Input(Protocol):
    """Source of messages."""

    def read(self) -> str | None:
        """The next message, or None when the user is done."""
        ...


def is_open(text: str) -> bool:
    """Whether `text` starts a triple-quoted message that is not yet closed."""
    message = text.strip()
    return message.startswith(QUOTES) and not (len(message) >= 2 * len(QUOTES) and message.endswith(QUOTES))


class Quoted(str):
    """A message that stood between triple quotes: never a command, whatever it begins with."""

    __slots__ = ()


def unquote(text: str) -> str:
    """`text` without its triple quotes (then it is `Quoted`) and the white space around it."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        return Quoted(stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n"))
    return stripped


class PlainInput:
    """Lines of a stream, to its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self) -> str | None:
        """
        Raises:
            UsageError: the message is too long for any tokenizer, or not UTF-8.
        """
        lines = [self._line(MAX_TEXT_BYTES)]
        if is_open(lines[0]):
            left = MAX_TEXT_BYTES - len(lines[0])
            while line := self._line(left):
                left -= len(line)
                lines.append(line)
                if line.rstrip().endswith(QUOTES):  # where `is_open` of the whole would become false
                    break
        text = "".join(lines)
        return unquote(text) if text else None

    def _line(self, most: int) -> str:
        try:
            line = self._stream.readline(most + 1)
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8 text ({error})") from error
        if len(line) > most:
            raise UsageError(f"a message of more than {format_size(MAX_TEXT_BYTES)}: shorten it")
        return line


class LineHistory(FileHistory):
    """History in a file that may fail to be written (disk full): the chat goes on, and `warn` is told once."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        super().__init__(str(path))
        self._warn: Callable[[str], None] | None = warn

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError as error:
            if self._warn is not None:
                self._warn(f"the input history is not kept: {error.strerror}")
            self._warn = None


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter", filter=Condition(lambda: is_open(get_app().current_buffer.text)))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)  # the default repeats the spaces of the line before

    return bindings


class TerminalInput:
    """An editing prompt with history and completion of commands. Pasted line feeds do not send.

    Ctrl-C clears the line, or on an empty one says how to leave; Ctrl-D leaves.
    """

    def __init__(self, history: History | None, commands: Iterable[str], say: Callable[[str], None]) -> None:
        self._say = say
        self._session: PromptSession[str] = PromptSession(
            message=">>> ",
            history=history or InMemoryHistory(),
            multiline=Condition(lambda: is_open(get_app().current_buffer.text)),
            prompt_continuation="... ",
            placeholder=HTML("<ansibrightblack>Ask something, or /help</ansibrightblack>"),
            completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
            complete_while_typing=False,
            key_bindings=_bindings(),
        )

    def read(self) -> str | None:
        while True:
            try:
                return unquote(self._session.prompt())
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    self._say(LEAVE_HINT)


def is_interactive() -> bool:
    """Whether a person sits at both ends."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
