"""Products of one token whose last rows the host computes where they lie, while the device computes the first ones.

Both end at about the same time when rows are divided by what the link and the host's kernels do in a second (HeteGen, arXiv
2403.01164).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from offload.kernels.batch import Floats
from offload.kernels.ggml.host_products import HostProducts
from offload.models.base import Model
from offload.models.checkpoint.base import TensorInfo
from offload.tiers.base import CancelToken


class SharedRows:
    """See the module. Called from one thread. Opens the host's kernels when it is given the first rows."""

    def __init__(self, model: Model, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._host: HostProducts | None = None
        self._first: dict[str, int] = {}
        self._fetched: tuple[torch.Tensor, Floats] | None = None

    def place(self, name: str, info: TensorInfo, first: int, address: int) -> None:
        """See `HostProducts.place`."""
        if self._host is None:
            self._host = HostProducts(self._model, self._threads)
        self._host.place(name, info, first, address)
        self._first[name] = first

    def on_device(self, name: str) -> int | None:
        """How many rows of a matrix the device computes; None where it computes all."""
        return self._first.get(name)

    def product(self, x: torch.Tensor, name: str, here: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`x @ matrix.T`, float32 [1, out_features], of x float32 [1, in_features]; `here` gives the first of them.

        Raises:
            Cancelled, BackendError: see `HostProducts.product`.
        """
        assert self._host is not None
        activation = self._on_host(x)  # before the device has more to do: nothing else is waited for
        first = here(x)
        rest = torch.from_numpy(self._host.product(name, activation).copy()).to(x.device)
        return torch.cat((first, rest[None]), dim=-1)

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """See `HostProducts.set_cancel`."""
        if self._host is not None:
            self._host.set_cancel(cancel)

    def close(self) -> None:
        """Frees everything. Idempotent."""
        self._fetched = None
        if self._host is not None:
            self._host.close()

    def _on_host(self, x: torch.Tensor) -> Floats:
        """Several matrices multiply one activation: it is fetched once."""
        if self._fetched is None or self._fetched[0] is not x:
            self._fetched = (x, x[0].cpu().numpy())
        return self._fetched[1]
