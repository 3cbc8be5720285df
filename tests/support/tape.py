"""What a CUDA graph does, on the CPU: everything in Python is frozen when it is recorded, only memory is read anew.

Stricter than a card in two things. What is recorded leaves no trace in memory, and what a replay computed is spoiled when it
ends, but for what lay in memory before: on a card another graph may, sooner or later, write there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
"""What has the host read a result."""


class TapeRecorder:
    """`graphs.Recorder` by tapes. `refuses`: raised by the next recordings instead, until it is None."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0
        self.refuses: Exception | None = None

    def record(self, work: Callable[[], None]) -> Tape:
        tape = Tape(self)
        with tape.undone(), tape:
            if self.refuses is not None:
                raise self.refuses
            work()
        self.tapes.append(tape)
        return tape

    def wait(self) -> None:
        pass


class Tape(TorchDispatchMode):
    """Calls with their tensors, whose memory each replay writes again."""

    def __init__(self, recorder: TapeRecorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._own: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def undone(self) -> _Undone:
        return _Undone(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing\nCompile with ..")
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        given = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable:
            for storage in given:
                if storage.data_ptr() not in self._own:
                    self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        known = {storage.data_ptr() for storage in given}
        fresh = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in known]
        self._own |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in fresh}
        if fresh or func._schema.is_mutable:  # else a view, which stays one
            self._calls.append((func, args, kwargs, fresh))
        return result

    def replay(self) -> None:
        self._recorder.replays += 1
        for func, args, kwargs, fresh in self._calls:
            made = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for kept, tensor in zip(fresh, made if fresh else [], strict=True):
                kept.copy_(tensor)
        self.spoil()

    def spoil(self) -> None:
        for storage in self._own.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)


class _Undone:
    """Puts memory back as it was before the block."""

    def __init__(self, before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for storage, bytes_before in self._before.values():
            storage.copy_(bytes_before)
        self._before.clear()
