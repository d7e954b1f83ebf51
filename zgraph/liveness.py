"""Bytes of temporary memory that are alive while a program runs, node by node.

State, batch and constants belong to the caller and are not counted. Views share the memory of what they view; a
collective's result exists from its start; what is sent stays until the wait. Values die after their last reader, as
in the emitted code.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.program import Program, operand

aten = torch.ops.aten

_VIEWS_IF_CONTIGUOUS = frozenset({aten.reshape.default, aten.contiguous.default, aten._reshape_alias.default})


def owners(program: Program) -> dict[fx.Node, fx.Node]:
    """For every node, the node that allocated the memory of its value, in whatever order they stand."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        path = [node]
        while path[-1] not in owner and (source := _lies_in(path[-1])) is not None:
            path.append(source)
        owner.update(dict.fromkeys(path, owner.get(path[-1], path[-1])))
    return owner


def shares_memory(node: fx.Node) -> bool:
    """Whether a value lies in memory that another node allocated."""
    return _lies_in(node) is not None


def _lies_in(node: fx.Node) -> fx.Node | None:
    """The node whose memory a value shares; None if it has memory of its own."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if ops.view_of(node) is not None or (node.target in _VIEWS_IF_CONTIGUOUS and source.meta["val"].is_contiguous()):
        return source
    if node.target is ops.pack_state_into:
        out = node.kwargs["out"]
        return out if isinstance(out, fx.Node) else None
    if node.target is ops.wait:
        out = source.kwargs.get("out")
        return out if isinstance(out, fx.Node) else source
    if node.target is operator.getitem:
        writes = getattr(source.target, "writes", None)
        index = writes[node.args[1]] if writes is not None else None
        return operand(source, index) if index is not None else None
    return None


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes over."""
    if node.target in ops.INTO:
        out = node.kwargs["out"]
        assert isinstance(out, fx.Node)
        return [out]
    writes: tuple[int | None, ...] = getattr(node.target, "writes", ())
    return [operand(node, index) for index in writes if index is not None]


@dataclass(frozen=True)
class Lifetime:
    """Temporary memory that a call allocates.

    Attributes:
        node: the call.
        num_bytes: of all its results that have memory of their own.
        first, last: positions in the graph of the call, and of the last one that needs the memory.
    """

    node: fx.Node
    num_bytes: int
    first: int
    last: int


def lifetimes(program: Program, *, staged: bool = True) -> list[Lifetime]:
    """Every temporary of a program, in order of allocation.

    Args:
        staged: collectives are zgraph's own transfers (gloo), where a reduction first receives every other rank's part
            and adds them up; a backend that reduces on the way (NCCL) allocates the result alone.
    """
    owner = owners(program)
    first: dict[fx.Node, int] = {}
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(program.graph.nodes):
        if node.op == "placeholder":
            continue
        if node.op == "call_function" and owner[node] is node:
            first[node] = index
        last[owner[node]] = index
        for source in node.all_input_nodes:
            last[owner[source]] = index
            if node.target is ops.wait:
                for sent in source.all_input_nodes:  # what travels is held until it has arrived
                    last[owner[sent]] = index
    return [Lifetime(node, _allocated(program, node, staged), start, last[node]) for node, start in first.items()]


def alive_bytes(program: Program) -> Iterator[tuple[fx.Node, int]]:
    """Each node with the bytes of temporaries alive just after it has run, its arguments still held."""
    nodes = list(program.graph.nodes)
    change = [0] * (len(nodes) + 1)
    for life in lifetimes(program):
        change[life.first] += life.num_bytes
        change[life.last + 1] -= life.num_bytes
    yield from zip(nodes, accumulate(change), strict=False)


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each call, the values that nothing reads after it (its own, if nothing reads it at all)."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if node.op == "call_function":
            dying.setdefault(node, []).append(value)
    return dying


def _allocated(program: Program, node: fx.Node, staged: bool) -> int:
    """Bytes that running ``node`` allocates for its results."""
    if node.target is ops.wait or node.target in ops.INTO or _has_getitems(node):
        return 0
    if node.target is ops.reduce_scatter and staged:
        # the parts of this rank's slice that the other ranks send
        return _bytes(node.meta["val"]) * max(program.mesh.size - 1, 1)
    return _bytes(node.meta["val"])


def _has_getitems(node: fx.Node) -> bool:
    """Whether the results of a node are counted at the nodes that unpack them."""
    return isinstance(node.meta["val"], (tuple, list))


def _bytes(val: Any) -> int:
    return val.nbytes if isinstance(val, torch.Tensor) else 0
