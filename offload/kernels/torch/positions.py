"""Where the tokens of a batch stand, and what follows from that for every layer: rotations and masks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from offload.config import KV_BUCKET
from offload.kernels.ops import Rope
from offload.units import align_down

Rotation = tuple[torch.Tensor, torch.Tensor]


class Positions:
    """What layers ask for is computed once for all of them; `refresh` computes it anew after the tokens have moved.

    Args:
        at: int64 [num_tokens], on the device.
        extent: the most positions that are attended to, from 0 on.
        dtype: of masks.
        first: position of the first token.

    Attributes:
        length: how many of them are attended to, those after a token's own masked: tensors have this length. Host code
            knows it, so it must not follow from the positions alone where kernels are recorded and replayed.
        first: as given. Only its bucket matters.
    """

    def __init__(self, at: torch.Tensor, extent: int, dtype: torch.dtype = torch.float32, first: int = 0) -> None:
        self.at = at
        self.length = extent
        self.first = first
        self._extent = extent
        self._dtype = dtype
        self._frequencies: dict[Rope, torch.Tensor] = {}
        self._rotations: dict[Rope, Rotation] = {}
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def known(self) -> int:
        """How many rotations and masks there are. They only become more."""
        return len(self._rotations) + len(self._masks)

    def rotation(self, rope: Rope, weights: Callable[[str], torch.Tensor]) -> Rotation:
        """Cosine and sine of every position and frequency, [num_tokens, 1, dims / 2]."""
        if rope not in self._rotations:
            exponents = torch.arange(0, rope.dims, 2, dtype=torch.float32, device=self.at.device) / rope.dims
            frequencies = rope.frequency_scale / rope.theta**exponents
            self._frequencies[rope] = frequencies if rope.factors is None else frequencies / weights(rope.factors)
            self._rotations[rope] = self._turned(rope)
        return self._rotations[rope]

    def start(self, window: int | None) -> int:
        """Where attention begins: whole buckets that the window has left are not looked at.

        The same for all tokens of a bucket, as the length is.
        """
        return 0 if window is None else align_down(max(0, align_down(self.first, KV_BUCKET) - window + 1), KV_BUCKET)

    def mask(self, window: int | None) -> torch.Tensor:
        """Zero where a query [num_tokens] sees a key [length - start], minus infinity elsewhere."""
        if window not in self._masks:
            self._masks[window] = self._hidden(window)
        return self._masks[window][:, self.start(window) : self.length]

    def refresh(self) -> None:
        """Computes all that was ever asked for into the tensors that were given out."""
        for rope, rotation in self._rotations.items():
            for kept, fresh in zip(rotation, self._turned(rope), strict=True):
                kept.copy_(fresh)
        for window, mask in self._masks.items():
            mask.copy_(self._hidden(window))

    def _turned(self, rope: Rope) -> Rotation:
        angles = self.at[:, None, None].float() * self._frequencies[rope]
        return angles.cos() * rope.magnitude, angles.sin() * rope.magnitude

    def _hidden(self, window: int | None) -> torch.Tensor:
        distance = self.at[:, None] - torch.arange(self._extent, device=self.at.device)
        unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(unseen.shape, dtype=self._dtype, device=self.at.device)
        return mask.masked_fill_(unseen, -torch.inf)
