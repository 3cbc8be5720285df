"""Every error a caller can meet, in one tree.

    OffloadError
    ├── UsageError            the caller asked for something that cannot be (also a ValueError)
    │   ├── BudgetError       the memory budget is below what the model needs
    │   ├── ContextError      the prompt does not fit the context
    │   └── UnsupportedError  an architecture, element type or feature that is not implemented
    ├── CheckpointError       a model file is malformed, truncated, or lies about itself
    ├── StorageError          the disk failed: I/O error, short read, file changed, no space
    ├── AllocationError       the machine refused memory that the plan had counted on
    ├── BackendError          a kernel library is missing, incompatible, or failed
    │   └── DeviceError       a device has failed or is gone
    ├── ClosedError           the engine was closed, or an earlier failure closed it
    └── Cancelled             the caller cancelled; not a failure

Messages are one line: the thing, the place, needed and available, the next step.
"""

from __future__ import annotations


class OffloadError(Exception):
    """Root of the tree. `str(error)` is one line that a user can act on."""


class UsageError(OffloadError, ValueError):
    """The request itself is wrong. Change the call and try again."""


class BudgetError(UsageError):
    """The budget is too small. Raise it to at least `minimum_bytes`."""

    def __init__(self, message: str, *, budget_bytes: int, minimum_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes


class ContextError(UsageError):
    """Prompt (or prompt and answer) longer than the context. Raise `ctx` or shorten the prompt."""

    def __init__(self, message: str, *, needed_tokens: int, available_tokens: int) -> None:
        super().__init__(message)
        self.needed_tokens = needed_tokens
        self.available_tokens = available_tokens


class UnsupportedError(UsageError):
    """The file or the option is understood, and is not something that this version can run."""


class CheckpointError(OffloadError):
    """A model file cannot be trusted. `path` names the file, `tensor` the tensor where one is to blame."""

    def __init__(self, message: str, *, path: str = "", tensor: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.tensor = tensor


class StorageError(OffloadError):
    """A read or a write failed. Carries the place; the bytes of the failed range were never used."""

    def __init__(self, message: str, *, path: str = "", offset: int = -1, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset
        self.errno = errno


class AllocationError(OffloadError):
    """Memory that the plan had counted on was refused. Free some or lower the budget."""

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class BackendError(OffloadError):
    """A kernel library is missing or incompatible, or a kernel reported failure."""


class DeviceError(BackendError):
    """A device has failed or is gone, and with it what it held. Load the model again."""


class ClosedError(OffloadError):
    """The engine is closed. Load it again."""


class Cancelled(OffloadError):
    """Raised out of a wait or a pass that the caller cancelled. The engine stays usable."""


class WouldBlock(OffloadError):
    """A `try_...` call could not finish at once. Never leaves the package."""
