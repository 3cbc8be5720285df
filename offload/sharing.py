"""Whether the host computes beside the device in the pass at hand; tried while tokens are made, and kept where it pays.

What the host computes of dense matrices are their last rows, in passes of one token: the link then carries only the first
ones. Prompts have all rows cross, since the device computes many tokens at once in the time that the link takes anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

from offload.blocks import BlockKey
from offload.device_stream import DeviceStream
from offload.prefetch.governor import Governor


class Sharing:
    """See the module. Driver thread only.

    Args:
        stream: what brings blocks to the device. nbytes: of those whose rows are shared, what crosses the link.

    Attributes:
        rows, experts: whether the host computes its rows, and experts where they lie, in the pass at hand.
    """

    def __init__(self, governor: Governor, stream: DeviceStream | None, nbytes: Mapping[BlockKey, int]) -> None:
        self.governor = governor
        self.rows = False
        self.experts = True
        self._stream = stream
        self._nbytes = nbytes

    def begin(self, tokens: int) -> None:
        """A pass of so many tokens begins."""
        is_step = tokens == 1
        self.experts = self.governor.allows or not is_step
        rows = is_step and self.governor.allows and bool(self._nbytes)
        if rows != self.rows and self._stream is not None:
            self._stream.shorten(self._nbytes if rows else {})
        self.rows = rows

    def passed(self, tokens: int, seconds: float) -> None:
        """It took so long."""
        if tokens == 1:
            self.governor.passed(seconds)
