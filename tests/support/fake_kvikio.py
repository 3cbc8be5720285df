"""kvikio as the engine uses it: `install` puts a stand-in where it is imported from. It reads into tensors of the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@dataclass
class FakeKvikio:
    """What it was told, and how it behaves: `answer` gets the number of a read and its bytes, and says how many came."""

    compat: bool = False
    gds: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    unfinished: int = 0
    freed: int = 0
    answer: Callable[[int, int], int] = lambda number, nbytes: nbytes
    finishes: Callable[[int], bool] = lambda number: True


class _Future:
    def __init__(self, fake: FakeKvikio, number: int, finish: Callable[[], int]) -> None:
        self.fake, self.number, self.finish, self.looks = fake, number, finish, 0
        fake.unfinished += 1

    def done(self) -> bool:
        self.looks += 1
        if self.looks == 2:
            self.fake.unfinished -= 1
        return self.looks >= 2 and self.fake.finishes(self.number)

    def get(self) -> int:
        assert self.done()
        return self.finish()


def install(fake: FakeKvikio, monkeypatch: pytest.MonkeyPatch) -> None:
    class CuFile:
        def __init__(self, file: str, flags: str = "r") -> None:
            assert flags == "r"
            self.file = file
            fake.opened.append(file)

        def pread(self, buf: torch.Tensor, size: int, file_offset: int) -> _Future:
            number = len(fake.reads)
            fake.reads.append((file_offset, size))

            def finish() -> int:
                count = fake.answer(number, size)
                with Path(self.file).open("rb") as source:
                    source.seek(file_offset)
                    buf[:count] = torch.frombuffer(bytearray(source.read(count)), dtype=torch.uint8)
                return count

            return _Future(fake, number, finish)

        def close(self) -> None:
            fake.closed.append(self.file)

    def free() -> int:
        fake.freed += 1
        return 0

    parts: dict[str, dict[str, Any]] = {
        "kvikio": {"CuFile": CuFile, "__version__": "26.10.0"},
        "kvikio.defaults": {"set": fake.settings.update, "is_compat_mode_preferred": lambda: fake.compat},
        "kvikio.cufile_driver": {"get": {"is_gds_available": fake.gds}.__getitem__},
        "kvikio.buffer": {"bounce_buffer_free": free},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
