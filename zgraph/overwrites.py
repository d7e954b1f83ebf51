"""Proof that no value in an arena is written over while something still reads it.

The calls of a program are replayed in the order in which they run, with the bytes that each writes. Whose memory a
result may lie in is read from the operators' schemas alone, and lifetimes and offsets are not looked at: a mistake in
working them out (``zgraph.liveness``, ``zgraph.placement``, ``zgraph.offsets``) is found here.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen.region import Region
from zgraph.errors import VerifyError
from zgraph.placement import Place, Placement, is_of_region
from zgraph.program import Program, operand

aten = torch.ops.aten
_MAY_COPY = frozenset({aten.reshape.default, aten.contiguous.default})


def check_overwrites(program: Program, placement: Placement) -> None:
    """Replay a program on its arena.

    Raises:
        VerifyError: a call reads what another has written over, a vector is not where its concatenation has it, or a
            result of the program lies in the arena.
    """
    arena = _Arena(placement.end)
    lies_in: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            lies_in[node] = frozenset()
            continue
        for source in node.all_input_nodes:
            for value in lies_in[source]:
                if value in arena.lost:
                    raise VerifyError(f"{node} reads {value}, which {arena.lost[value]} has written over")
            if node.op == "output" and lies_in[source]:
                raise VerifyError(f"{source} is returned, and lies in the arena")
        if isinstance(node.target, Region):
            _write_results(node, placement, arena, lies_in)
        elif node in placement.places and is_of_region(node):
            lies_in[node] = frozenset([node])  # written when the region ran
        elif node in placement.places:
            read = {value for source in node.all_input_nodes for value in lies_in[source]}
            if node in placement.copied:
                _check_vectors(node, placement, lies_in)
                read = set()  # what is made where it belongs becomes part of the result
            arena.write(node, placement.places[node])
            for value in read & arena.lost.keys():
                raise VerifyError(f"{node} reads {value}, which it has written over")
            lies_in[node] = frozenset([node, *(_sent(node, lies_in) if node.target in ops.ASYNCHRONOUS else ())])
        else:
            lies_in[node] = _shared(node, lies_in)


def _write_results(
    region: fx.Node, placement: Placement, arena: _Arena, lies_in: dict[fx.Node, frozenset[fx.Node]]
) -> None:
    """A region stores its results while it reads, each in one place, whatever unpacks it."""
    read = {value for source in region.all_input_nodes for value in lies_in[source]}
    written = [user for user in region.users if user in placement.places]
    for result in written:
        arena.write(result, placement.places[result])
    for value in (read | set(written)) & arena.lost.keys():
        raise VerifyError(f"{region} writes {arena.lost[value]} over {value}")
    lies_in[region] = frozenset()


class _Arena:
    """The values whose bytes are as they were written, by first byte; and the others, with what wrote over them."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.whole: list[tuple[int, int, int]] = []
        self.nodes: list[fx.Node] = []
        self.lost: dict[fx.Node, fx.Node] = {}

    def write(self, node: fx.Node, place: Place) -> None:
        if not 0 <= place.start <= place.stop <= self.num_bytes:
            raise VerifyError(f"{node} lies at bytes {place.start} to {place.stop} of {self.num_bytes}")
        low = bisect_right(self.whole, (place.start,)) - 1
        if low < 0 or self.whole[low][1] <= place.start:
            low += 1
        high = bisect_left(self.whole, (place.stop,))
        for *_, index in self.whole[low:high]:
            self.lost[self.nodes[index]] = node
        del self.whole[low:high]
        insort(self.whole, (place.start, place.stop, len(self.nodes)))
        self.nodes.append(node)


def _check_vectors(cat: fx.Node, placement: Placement, lies_in: Mapping[fx.Node, frozenset[fx.Node]]) -> None:
    """Each vector of a concatenation is copied to where it belongs, or lies there."""
    start = placement.places[cat].start
    vectors: Any = cat.args[0]
    for index, vector in enumerate(vectors):
        if vector.meta["val"].dtype != cat.meta["val"].dtype:
            raise VerifyError(f"{vector} is converted by {cat}, and cannot lie in it")
        stop = start + vector.meta["val"].nbytes
        copied = placement.copied[cat].get(index)
        there = [copied] if copied is not None else [placement.places[value] for value in lies_in[vector]]
        if stop > start and [(each.start, each.stop) for each in there] != [(start, stop)]:
            raise VerifyError(f"{vector} belongs at bytes {start} to {stop} of {cat}, and is not there")
        start = stop


def _sent(start: fx.Node, lies_in: Mapping[fx.Node, frozenset[fx.Node]]) -> frozenset[fx.Node]:
    """What travels has to stay as it is; an all-reduce sends a copy."""
    kept = () if start.target is ops.all_reduce else start.all_input_nodes
    return frozenset().union(*(lies_in[source] for source in kept))


def _shared(node: fx.Node, lies_in: Mapping[fx.Node, frozenset[fx.Node]]) -> frozenset[fx.Node]:
    """The values in the arena whose bytes a call's result may have, or that have to stay as long as it is read."""
    everything = frozenset().union(*(lies_in[source] for source in node.all_input_nodes))
    if node.target in ops.ASYNCHRONOUS:
        return _sent(node, lies_in)
    if node.target is ops.pack_state_into:
        return lies_in[node.kwargs["out"]]  # type: ignore[index]
    if node.target is ops.wait:  # a reduction's result has memory of its own
        start = operand(node)
        return lies_in[start] - _sent(start, lies_in)
    if node.target is operator.getitem:
        writes = getattr(operand(node).target, "writes", None)
        if writes is None:
            return everything
        index = writes[node.args[1]]
        return frozenset() if index is None else lies_in[operand(operand(node), index)]
    if hasattr(node.target, "writes"):
        return everything
    out = ops.out_of(node.target)
    if out is not None:
        return lies_in[node.kwargs[out]]  # type: ignore[index]
    if not isinstance(node.target, torch._ops.OpOverload):
        return frozenset()
    if node.target in _MAY_COPY and _copies(node):
        return frozenset()
    returned = node.target._schema.returns
    is_own = all(each.alias_info is None for each in returned)
    return frozenset() if is_own and node.target not in (*_MAY_COPY, aten._unsafe_view.default) else everything


def _copies(node: fx.Node) -> bool:
    """Whether torch copies, when it is asked on tensors of the same form without memory."""
    val = operand(node).meta["val"]
    given = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    made = node.target(given, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return bool(made.untyped_storage()._cdata != given.untyped_storage()._cdata)
