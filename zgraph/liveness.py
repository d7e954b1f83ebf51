"""Bytes of temporary memory that are alive while a program runs, node by node.

State, batch and constants belong to the caller and are not counted. Views share the memory of what they view; the
result of a collective, or of a load from a lower tier, exists from its start; what is sent or stored stays until the
wait; what has been spilled takes no memory.
Values die after their last reader, as in the emitted code.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import fx

from zgraph import ops
from zgraph.program import Program, operand
from zgraph.scratch import kept_bytes

aten = torch.ops.aten


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
        return _written_over(node) if ops.may_write(node.target) else None
    if ops.view_of(node) is not None:
        return None if _copies(node, source) else source
    if node.target is ops.share:
        return source
    if node.target is ops.wait:
        out = source.kwargs.get("out")
        return out if isinstance(out, fx.Node) else source
    if ops.may_write(node.target) and node.target not in ops.ASYNCHRONOUS:
        return _written_over(node)
    if node.target is operator.getitem:
        writes = getattr(source.target, "writes", None)
        index = writes[node.args[1]] if writes is not None else None
        return operand(source, index) if index is not None else None
    return None


def _written_over(node: fx.Node) -> fx.Node | None:
    """The argument that an operator of torch stores its only result in and returns."""
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.target._schema.returns) != 1:
        return None
    alias = node.target._schema.returns[0].alias_info
    if alias is None or not alias.is_write:
        return None
    for argument in node.target._schema.arguments:
        info = argument.alias_info
        if info is not None and info.is_write and info.before_set == alias.before_set:
            given = ops.argument(node, argument.name)
            return given if isinstance(given, fx.Node) else None
    return None


def _copies(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator that may give a view has to give a copy."""
    val = source.meta["val"]
    if node.target is aten.contiguous.default:
        asked = node.kwargs.get("memory_format", torch.contiguous_format)
        return not val.is_contiguous(memory_format=asked)
    if node.target is not aten.reshape.default or val.is_contiguous():
        return False
    try:  # a fake tensor's view takes strides of 0 for others beside dimensions of one element
        torch.empty_strided(val.shape, val.stride(), device="meta").view(node.meta["val"].shape)
    except (RuntimeError, ValueError):
        return True
    return False


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes over."""
    name = ops.out_of(node.target)
    if name is not None:
        out = node.kwargs[name]
        assert isinstance(out, fx.Node)
        return [out]
    writes: tuple[int | None, ...] = getattr(node.target, "writes", ())
    return [operand(node, index) for index in writes if index is not None]


class Held(Protocol):
    """Bytes, and the first and last position in a graph at which they are held."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...


@dataclass(frozen=True)
class Lifetime:
    """Temporary memory that a call allocates.

    Attributes:
        node: the call; of several results, what unpacks one of them.
        num_bytes: of its results that have memory of their own.
        first, last: positions in the graph of the call, and of the last one that needs the memory.
        is_beside: whether it is none of the results': what other ranks sent, until that has been added up, or what
            an operator of zgraph's works in.
    """

    node: fx.Node
    num_bytes: int
    first: int
    last: int
    is_beside: bool = False


def lifetimes(
    program: Program,
    *,
    staged: bool = True,
    also_reads: Mapping[fx.Node, Iterable[fx.Node]] = MappingProxyType({}),
    owner: Mapping[fx.Node, fx.Node] | None = None,
) -> list[Lifetime]:
    """Every temporary of a program, in order of allocation.

    What a kernel adds up in while it runs is part of its memory. Several results of a call are there from the call on,
    and those that nothing unpacks, or not yet, for as long as others are being unpacked. What is sent is held until the
    wait; but an all-reduce sends a copy.

    Args:
        also_reads: what calls read beside their arguments (``zgraph.fusion``).
        staged: collectives are messages between ranks (``zgraph.comm.PointToPointComm``), where a reduction first
            receives every other rank's part and adds them up. Ranks that read each other's memory, and backends that
            reduce on the way (NCCL), allocate the result alone.
        owner: what ``owners`` gives, for those who ask about one order of the calls after another.
    """
    owner = owners(program) if owner is None else dict(owner)
    first: dict[fx.Node, int] = {}
    last: dict[fx.Node, int] = {}
    unpacked: dict[fx.Node, dict[Any, fx.Node]] = {}
    beside: list[Lifetime] = []
    for index, node in enumerate(program.graph.nodes):
        if node.op == "placeholder":
            continue
        if node.op == "call_function" and owner[node] is node:
            first[node] = index
            if node.target is operator.getitem and operand(node) in first:
                first[node] = first[operand(node)]
                same = unpacked.setdefault(operand(node), {}).setdefault(node.args[1], node)
                if same is not node:  # unpacked twice
                    del first[node]
                    owner[node] = same
        last[owner[node]] = index
        if num_bytes := ops.scratch_bytes(node):
            beside.append(Lifetime(node, num_bytes, index, index, is_beside=True))
        for source in (*node.all_input_nodes, *also_reads.get(node, ())):
            last[_memory(owner, source)] = index
            if node.target is ops.wait and source.target is not ops.all_reduce:
                for sent in source.all_input_nodes:  # what travels is held until it has arrived
                    last[_memory(owner, sent)] = index
                if source.target is ops.reduce_scatter and staged:
                    # the result is added up where the first part of this rank's slice came to lie
                    size = program.mesh.axes[ops.axis_of(source)]
                    more = own_bytes(source.meta["val"]) * max(size - 2, 0)
                    beside.append(Lifetime(source, more, first[source], index, is_beside=True))
    found = [life for life in beside if life.num_bytes]
    for node, start in first.items():
        end = last[node]
        if node.target is operator.getitem:
            end = max(end, last[operand(node)])
        num_bytes = _allocated(node, unpacked.get(node, {}).keys())
        found.append(Lifetime(node, num_bytes, start, end))
    return sorted(found, key=lambda life: life.first)


def _memory(owner: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """The owner of a node's memory, where the owner itself may be a second name for another's."""
    found = owner[node]
    return owner[found]


def values_of(program: Program, lives: Iterable[Lifetime]) -> Iterator[Lifetime]:
    """The values that lie in temporaries one after another, where calls write over what lies there.

    Args:
        program: as it stands.
        lives: its temporaries; each has the first value, and lasts as long as the last one.
    """
    writers = writers_of(program)
    for life in lives:
        begins = [] if life.is_beside else writers.get(life.node, [])
        nodes, starts = [life.node, *(node for _, node in begins)], [life.first, *(start for start, _ in begins)]
        ends = [*(start - 1 for start in starts[1:]), life.last]
        for node, first, last in zip(nodes, starts, ends, strict=True):
            yield replace(life, node=node, first=first, last=last)


def writers_of(program: Program) -> dict[fx.Node, list[tuple[int, fx.Node]]]:
    """By memory, the results that are written over what lies there, each with the position of the call that writes."""
    owner = owners(program)
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    found: dict[fx.Node, list[tuple[int, fx.Node]]] = {}
    for node in program.graph.nodes:
        if owner[node] is not node and ops.view_of(node) is None and node.target is not ops.wait:
            call = operand(node) if node.target is operator.getitem else node
            found.setdefault(owner[node], []).append((position[call], node))
    return found


def alive_bytes(program: Program, *, staged: bool = True) -> Iterator[tuple[fx.Node, int]]:
    """Each node with the bytes of temporaries alive just after it has run, its arguments still held.

    Args:
        staged: see ``lifetimes``.
    """
    nodes = list(program.graph.nodes)
    yield from zip(nodes, held_bytes(lifetimes(program, staged=staged), len(nodes)), strict=True)


def held_bytes(held: Iterable[Held], num_positions: int) -> list[int]:
    """Bytes of all that is held together, at each position of a graph."""
    change = [0] * (num_positions + 1)
    for each in held:
        change[each.first] += each.num_bytes
        change[each.last + 1] -= each.num_bytes
    return list(accumulate(change))[:num_positions]


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


def _allocated(node: fx.Node, unpacked: Collection[Any]) -> int:
    """Bytes that running ``node`` allocates for its results, those not counted that are unpacked from them."""
    if node.target in (ops.wait, ops.spill) or node.target in ops.INTO:
        return 0
    val = node.meta.get("val")  # a gradient that an operator does not give has none
    if not isinstance(val, (tuple, list)):
        call, index = (operand(node), node.args[1]) if node.target is operator.getitem else (node, None)
        return own_bytes(val) + kept_bytes(call, index)  # type: ignore[arg-type]
    if ops.is_view(node.target):
        return 0
    writes = getattr(node.target, "writes", (None,) * len(val))
    workspace_bytes: int = getattr(node.target, "workspace_bytes", 0)
    return workspace_bytes + sum(
        own_bytes(each) + kept_bytes(node, index)
        for index, (each, write) in enumerate(zip(val, writes, strict=True))
        if index not in unpacked and write is None
    )


def own_bytes(val: Any) -> int:
    """Bytes of the memory that a value has of its own, gaps between its elements included.

    How many elements a sparse tensor keeps is known only once it is made: it is counted as if it were dense.
    """
    if not isinstance(val, torch.Tensor):
        return 0
    return val.untyped_storage().nbytes() if val.layout is torch.strided else val.numel() * val.element_size()
