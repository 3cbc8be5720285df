"""Memory for the inner nodes of graphs, and the graphs that point into it, cached by what they were built for.

All graphs of a workspace share its memory, one after the other: nothing in it outlives the run of a graph.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from offload.errors import BackendError
from offload.kernels.ggml.library import Library


@dataclass(slots=True)
class Graph:
    """A built graph: the cells through which its leaves and results are pointed at memory before a run."""

    context: int
    graph: int
    inputs: dict[str, ctypes.c_uint64]
    masks: dict[int | None, ctypes.c_uint64]
    hidden_in: ctypes.c_uint64
    hidden_out: ctypes.c_uint64 | None
    parts: list[tuple[int, ctypes.c_uint64]]  # (number of the head part, its data cell)


class Workspace:
    """See the module. Takes memory when a graph is allocated, and keeps it until `release`."""

    def __init__(self, library: Library, max_graphs: int) -> None:
        self._lib = library
        self._max_graphs = max_graphs
        self._allocator: int | None = None
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes that the largest graph so far needs."""
        return 0 if self._allocator is None else int(self._lib.ggml_gallocr_get_buffer_size(self._allocator, 0))

    def get(self, key: Hashable) -> Graph | None:
        """The cached graph."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def add(self, key: Hashable, graph: Graph) -> None:
        """Caches an allocated graph; the one that was not asked for longest makes room."""
        self._graphs[key] = graph
        if len(self._graphs) > self._max_graphs:
            self._lib.ggml_free(self._graphs.popitem(last=False)[1].context)

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
            self._lib.ggml_free(self._graphs.popitem()[1].context)

    def release(self) -> None:
        """Drops the graphs and frees the memory; a later graph takes it anew."""
        self.forget()
        if self._allocator is not None:
            self._lib.ggml_gallocr_free(self._allocator)
            self._allocator = None
