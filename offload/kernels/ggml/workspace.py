"""Memory for the inner nodes of graphs, and the graphs that point into it, cached by what they were built for.

All graphs of a workspace share its memory, one after the other: nothing in it outlives the run of a graph.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from offload.blocks import BlockKey
from offload.errors import BackendError
from offload.kernels.ggml.library import Library
from offload.kernels.ggml.pieces import Follower
from offload.kernels.ggml.table_attention import Moving

MAX_GRAPHS: Final = 4  # full and last micro-batches, for this KV bucket and the one before


class WorkspaceNeeds(NamedTuple):
    """Bytes for passes of a few tokens, for prompts in addition, and for each of a prompt's micro-batches."""

    few: int
    prompt: int
    micro_batch: int


@dataclass(slots=True)
class Graph:
    """A built graph in pieces, and the cells through which its leaves and results are pointed at memory before a pass.

    Attributes:
        contexts: ggml's memory for the graph's description.
        logits: results of the head's parts, in order. tables: what moves with a table of the cache.
    """

    contexts: tuple[int, ...]
    pieces: Sequence[int]
    inputs: dict[str, ctypes.c_uint64]
    masks: dict[int | None, ctypes.c_uint64]
    hidden: ctypes.c_uint64
    logits: list[ctypes.c_uint64]
    followers: Sequence[Follower]
    tables: Mapping[BlockKey, tuple[Moving, ...]]


class Cached(Protocol):
    """What a workspace caches: a graph, and ggml's memory for its description."""

    @property
    def contexts(self) -> tuple[int, ...]: ...


G = TypeVar("G", bound=Cached)


class Workspace(Generic[G]):
    """See the module. Caches `most` graphs. Takes memory when a graph is allocated, and keeps it until `release`."""

    def __init__(self, library: Library, most: int = MAX_GRAPHS) -> None:
        self._lib = library
        self._most = most
        self._allocator: int | None = None
        self._graphs: OrderedDict[Hashable, G] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes that the largest graph so far needs."""
        return 0 if self._allocator is None else int(self._lib.ggml_gallocr_get_buffer_size(self._allocator, 0))

    def get(self, key: Hashable) -> G | None:
        """The cached graph."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def add(self, key: Hashable, graph: G) -> None:
        """Caches an allocated graph; the one that was not asked for longest makes room."""
        self._graphs[key] = graph
        if len(self._graphs) > self._most:
            self.free(self._graphs.popitem(last=False)[1])

    def allocate(self, graph: int) -> None:
        """Gives the graph's inner nodes their places.

        Raises:
            BackendError: no memory for them.
        """
        if self._allocator is None:
            self._allocator = self._lib.ggml_gallocr_new(self._lib.ggml_backend_cpu_buffer_type())
        before = self.nbytes
        if not self._lib.ggml_gallocr_alloc_graph(self._allocator, graph):
            raise BackendError("ggml: no memory for the workspace of a graph; lower --ctx or raise --ram")
        if self.nbytes != before:
            self.forget()  # the memory moved, and cached graphs still point to where it was

    def forget(self) -> None:
        """Drops the cached graphs."""
        while self._graphs:
            self.free(self._graphs.popitem()[1])

    def free(self, graph: G) -> None:
        """Frees a graph that is not cached."""
        for context in graph.contexts:
            self._lib.ggml_free(context)

    def release(self) -> None:
        """Drops the graphs and frees the memory; a later graph takes it anew."""
        self.forget()
        if self._allocator is not None:
            self._lib.ggml_gallocr_free(self._allocator)
            self._allocator = None
