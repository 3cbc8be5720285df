"""Where a graph of the whole model is cut, so that it can be run as far as weights have arrived.

    nodes of the graph    norm  Wq.x  Wk.x  Wv.x  rope ...            all of it allocated at once
    pieces                [norm] [Wq.x] [Wk.x  Wv.x  rope ...] ...    a new one before each product with a streamed block

A product with a matrix in parts is replaced by one product for each part. Each writes its columns of the result that the
graph has room for, so nothing is copied together afterwards, and each row has the bits that the whole product would give it.

Where experts have to be brought, a piece ends with their choice, and another begins with what they returned; in between
lies the piece of what every token passes through.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import NamedTuple

from offload.blocks import BlockKey
from offload.kernels.batch import Piece
from offload.kernels.ggml.library import FLOAT_BYTES, Library
from offload.kernels.ggml.table_attention import Attended
from offload.models.base import Model
from offload.models.checkpoint.base import TensorInfo
from offload.models.order import order_of


class Part(NamedTuple):
    """A range of a matrix's rows, and whether it has to arrive."""

    key: BlockKey
    is_streamed: bool


Form = tuple[Part, ...]
"""A matrix that cannot be used at once, as its parts in order."""


class Follower(NamedTuple):
    """A product of a part lies `offset` bytes behind the start of the whole product, wherever that is put."""

    cell: ctypes.c_uint64
    leader: ctypes.c_uint64
    offset: int


class _Product(NamedTuple):
    """Node number `node` of the graph: the product of a matrix that comes in parts, and what it is multiplied with."""

    node: int
    name: str
    tensor: int
    factor: int
    num_tokens: int


def cut_passes(
    model: Model,
    keys: Mapping[str, Sequence[BlockKey]],
    streamed: AbstractSet[BlockKey],
    fetched: AbstractSet[int] = frozenset(),
    tables: Mapping[int, Sequence[BlockKey]] = MappingProxyType({}),
) -> list[Piece]:
    """The pieces of every pass: one before the first block that has to arrive, then one for each.

    Args:
        fetched: layers whose experts have to be brought. tables: of the layers whose cache has to arrive, by layer.
    """
    pieces = [Piece(f"{model.stages[0].name} ..", 0, ())]
    for stage in model.stages:
        for name in order_of(stage):
            if name is None:
                pieces += [Piece(str(key), 0, (key,)) for key in tables.get(stage.layer, ())]
                if stage.layer in tables:
                    pieces.append(Piece(f"{stage.name} ..", 0, ()))
                continue
            for key in keys[name]:
                if key in streamed:
                    pieces.append(Piece(str(key), 0, (key,)))
                else:
                    pieces[-1] = pieces[-1]._replace(pinned=pieces[-1].pinned + 1)
        if stage.routes and stage.layer in fetched:
            pieces[-1] = pieces[-1]._replace(routes=stage.layer)
            pieces.append(Piece(f"{stage.name} ..", 0, ()))
        if stage.mixes and stage.layer in fetched:
            if stage.matrices:
                pieces.append(Piece("", 0, ()))
            pieces[-1] = pieces[-1]._replace(name=f"{stage.name} ..", mixes=stage.layer)
    return pieces


class Cutter:
    """Notes the products of matrices in parts while a graph is built, and cuts it when it has been allocated.

    Args:
        forms: the matrices that come in parts.
    """

    def __init__(self, library: Library, context: int, graph: int, forms: Mapping[str, Form]) -> None:
        self._lib = library
        self._context = context
        self._graph = graph
        self._forms = forms
        self._products: list[_Product | Attended] = []
        self._breaks: list[int] = []
        self.followers: list[Follower] = []

    def note(self, name: str, product: int, factor: int, num_tokens: int) -> None:
        """Matrix `name` times `factor` is the node `product`."""
        if name in self._forms:
            # in the graph at once, so that products are in the order in which blocks arrive
            self._lib.ggml_build_forward_expand(self._graph, product)
            index = self._lib.ggml_graph_n_nodes(self._graph) - 1
            self._products.append(_Product(index, name, product, factor, num_tokens))

    def note_attention(self, attended: Attended) -> None:
        """The tables of a layer have to arrive, one after the other."""
        self._products.append(attended)

    def end_piece(self) -> None:
        """What is in the graph so far is run, then others have a say, then comes the rest."""
        index = self._lib.ggml_graph_n_nodes(self._graph)
        if not self._breaks or self._breaks[-1] != index:
            self._breaks.append(index)

    def cut(
        self, tensor_of: Callable[[BlockKey], int], info_of: Callable[[BlockKey], TensorInfo],
        head_of: Callable[[Attended, int], Sequence[int]] = lambda *_: (),
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """The pieces as graphs, in order, and the contexts that hold them.

        Args:
            tensor_of: the ggml tensor of a part. info_of: its description. head_of: the nodes for a head of keys.
        """
        if not self._products and not self._breaks:
            return [], [self._graph]
        nodes = [self._lib.ggml_graph_node(self._graph, i) for i in range(self._lib.ggml_graph_n_nodes(self._graph))]
        pieces: list[list[int]] = [[]]
        done, breaks = 0, deque(self._breaks)
        for product in self._products:
            if isinstance(product, Attended):
                done = self._break_before(product.first, breaks, pieces, nodes, done)
                pieces[-1] += nodes[done : product.first]
                pieces += [list(head_of(product, head)) for head in range(product.num_kv_heads)]
                pieces.append([])
                done = product.end
                continue
            done = self._break_before(product.node, breaks, pieces, nodes, done)
            pieces[-1] += nodes[done : product.node]
            first_row = 0
            for part in self._forms[product.name]:
                if part.is_streamed:
                    pieces.append([])
                pieces[-1].append(self._part_product(product, tensor_of(part.key), first_row))
                first_row += info_of(part.key).shape[0]
            done = product.node + 1
        done = self._break_before(len(nodes), breaks, pieces, nodes, done)
        pieces[-1] += nodes[done:]
        return self._graphs(pieces)

    @staticmethod
    def _break_before(end: int, breaks: deque[int], pieces: list[list[int]], nodes: Sequence[int], done: int) -> int:
        """Ends pieces at the breaks up to node `end`; returns how many nodes are dealt with."""
        while breaks and breaks[0] <= end:
            pieces[-1] += nodes[done : breaks[0]]
            done = breaks.popleft()
            pieces.append([])
        return done

    def _part_product(self, product: _Product, part: int, first_row: int) -> int:
        lib = self._lib
        node: int = lib.ggml_mul_mat(self._context, part, product.factor)
        lib.substitute(node, product.tensor, product.num_tokens)
        follower = Follower(lib.data_cell(node), lib.data_cell(product.tensor), first_row * FLOAT_BYTES)
        follower.cell.value = follower.leader.value + follower.offset
        self.followers.append(follower)
        return node

    def _graphs(self, pieces: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        lib = self._lib
        context = lib.context(sum(lib.ggml_graph_overhead_custom(len(piece), False) + 64 for piece in pieces))
        graphs = []
        for piece in pieces:
            graph = lib.ggml_new_graph_custom(context, len(piece), False)
            for node in piece:
                lib.ggml_graph_add_node(graph, node)
            graphs.append(graph)
        return [context], graphs
