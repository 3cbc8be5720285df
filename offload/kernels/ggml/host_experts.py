"""Experts computed on the CPU in the slots where they lie, for a backend that computes the rest elsewhere.

The kernels, and the graphs over a bank, are those of the CPU backend; what goes in and comes back are arrays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from offload.config import FEW_TOKENS
from offload.errors import BackendError, Cancelled
from offload.kernels.batch import ExpertPlace, Floats, Ints
from offload.kernels.ggml.anchor import Anchor
from offload.kernels.ggml.expert_layers import ExpertLayers
from offload.kernels.ggml.library import STATUS_ABORTED, STATUS_SUCCESS, AbortCallback, load_library
from offload.models.base import Model
from offload.tiers.base import CancelToken


class HostExperts:
    """See the module. Called from one thread."""

    def __init__(self, model: Model, threads: int) -> None:
        self._lib = load_library()
        self._vectors: dict[str, Floats] = {}
        self._cancel: CancelToken | None = None
        with ExitStack() as stack:  # whatever fails below frees what was made before it
            self._backend = self._lib.ggml_backend_cpu_init()
            stack.callback(self._lib.ggml_backend_free, self._backend)
            self._lib.ggml_backend_cpu_set_n_threads(self._backend, threads)
            anchor = Anchor(self._lib)
            stack.callback(anchor.close)
            self._layers = ExpertLayers(self._lib, model, anchor, lambda name: self._vectors[name].ctypes.data)
            stack.callback(self._layers.close)
            self._stack = stack.pop_all()

    @property
    def nbytes(self) -> int:
        """Host memory that the largest choice takes."""
        needs = self._layers.needs
        return needs.few + needs.prompt + needs.micro_batch

    def place(self, layer: int, place: ExpertPlace) -> None:
        """Says where the experts of a layer can lie."""
        self._layers.place(layer, place)

    def place_vector(self, name: str, values: Floats) -> None:
        """Gives a bias its values; kept alive here."""
        self._vectors[name] = np.ascontiguousarray(values, dtype=np.float32)

    def set_cancel(self, cancel: CancelToken | None) -> None:
        """Looks at this token between the nodes of a graph."""
        self._cancel = cancel  # ggml keeps the address of its flag
        callback, flag = (
            (AbortCallback(), None) if cancel is None else (self._lib.is_set, ctypes.addressof(cancel.flag))
        )
        self._lib.ggml_backend_cpu_set_abort_callback(self._backend, callback, flag)

    def compute(self, layer: int, x: Floats, chosen: Ints, slots: Mapping[int, int]) -> Floats:
        """What some of the chosen experts return, float32 [tokens, num_used, hidden_size]; elsewhere undefined. A view.

        Args:
            x: float32 [tokens, hidden_size], at most `MICRO_BATCH_TOKENS`. chosen: int32 [tokens, num_used].
            slots: where the experts to compute lie, by their numbers.

        Raises:
            Cancelled, BackendError: not all were computed.
        """
        tokens, number = len(x), 0 if len(x) <= FEW_TOKENS else 1
        returned = self._layers.enter(number, layer, x, chosen)
        status = self._layers.compute(self._backend, number, layer, tokens, slots)
        if status == STATUS_ABORTED:
            raise Cancelled("cancelled")
        if status != STATUS_SUCCESS:
            raise BackendError(f"ggml: experts of layer {layer} failed with status {status}")
        return returned

    def close(self) -> None:
        """Frees everything. Idempotent."""
        self._stack.close()
