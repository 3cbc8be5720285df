"""A program on a pseudo-terminal, and a screen that obeys its escape sequences: what a person would see."""

import os
import termios
import time
from pathlib import Path

import pexpect
import pyte

ROOT = Path(__file__).parents[2]
COLUMNS, ROWS = 60, 24
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """`text` is what was ever on the screen, `raw` the bytes that came.

    `left_cooked`: after `leave`, whether the terminal echoed and edited lines, as a shell's user expects.
    """

    def __init__(self, *command: str, home: Path) -> None:
        environment = os.environ | {
            "TERM": "xterm-256color",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "XDG_STATE_HOME": str(home),
            "XDG_DATA_HOME": str(home),
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        self.screen = pyte.HistoryScreen(COLUMNS, ROWS, history=10_000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.left_cooked = False
        program, *arguments = command
        self.process = pexpect.spawn(program, arguments, env=environment, dimensions=(ROWS, COLUMNS), timeout=20)

    def text(self) -> str:
        """History and screen, lines without their trailing blanks."""
        above = ["".join(line[column].data for column in range(COLUMNS)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    def wait_for(self, words: str, seconds: float = 20.0) -> str:
        deadline = time.monotonic() + seconds
        while words not in self.text():
            assert time.monotonic() < deadline, f"{words!r} never came:\n{self.text()}"
            self._pump()
        return self.text()

    def type(self, keys: str) -> None:
        self.process.send(keys)

    def leave(self) -> int | None:
        """Feed the rest of the output and return the exit code; None where a signal ended the program."""
        deadline = time.monotonic() + 20
        while self.process.isalive() and time.monotonic() < deadline:
            self._pump()
        self._pump()
        cooked = termios.ECHO | termios.ICANON
        self.left_cooked = termios.tcgetattr(self.process.child_fd)[3] & cooked == cooked
        self.process.close()
        return None if self.process.exitstatus is None else int(self.process.exitstatus)

    def _pump(self) -> None:
        try:
            data = self.process.read_nonblocking(65536, timeout=0.05)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        self.raw += data
        self._stream.feed(data)
