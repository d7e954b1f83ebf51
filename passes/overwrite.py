"""Write over what nothing reads any more, instead of beside it.

A gradient that flows backward through an elementwise operator is in memory twice there, beside what forward has kept;
and so are the numbers that a softmax makes others of. At a loss over a vocabulary these are the largest tensors of a
step, and its peak. Once is enough.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen.elementwise import results_of
from zgraph.codegen.region import Region
from zgraph.into import can_be_told, out_overload
from zgraph.liveness import Lifetime, lifetimes, own_bytes, owners
from zgraph.passes.join_loss import joinable
from zgraph.pipeline import Pass
from zgraph.placement import SMALLEST_BYTES, is_of_region
from zgraph.program import Phase, Program, Stage, operand, phase_of

aten = torch.ops.aten


@dataclass(frozen=True)
class OverwriteOperands(Pass):
    """Let calls store their results over operands that they are the last to read.

        x = mm(h, w)                                  x = mm(h, w)
        y = log_softmax(x, 1)                   ->    y = log_softmax(x, 1, out=x)
        ...                                           ...
        gx = cross_entropy_backward(gl, y, ...)       gx = cross_entropy_backward(gl, y, ..., out=y)
        gz = mul(gx, z)                               gz = mul(gx, z, out=gx)

    In backward, only elementwise calls do, those that work row by row (``zgraph.ops.may_overwrite``), and regions whose
    loops have read an element before they store one there (``zgraph.codegen.region``). In forward, softmaxes do and
    their logarithms, which nothing needs their operands for: what else is made there is small beside what is kept. They
    write over what their own phase has made: all of some memory, in the shape, strides and dtype of the result. What
    forward has kept stays, since which of it is kept or made again is decided by looking at it as it is; but for what
    the gradient of a cross-entropy's logits is made of, with which backward begins. So does what only the C library has
    a place for: on a CPU, what can lie in the arena (``zgraph.placement``) stays there. Small values stay as they are.
    """

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        writes: dict[fx.Node, dict[int, int]] = {}
        for node, source in overwriting(program, lifetimes(program)).items():
            if is_of_region(node):
                call, index = operand(node), node.args[1]
                assert isinstance(index, int)
                writes.setdefault(call, {})[index] = call.args.index(source)
                continue
            told = out_overload(node.target)
            assert told is not None
            node.target, name = told
            node.kwargs = {**node.kwargs, name: source}
        alike: dict[tuple[Region, tuple[int | None, ...]], Region] = {}  # one kernel, as before
        for call, over in writes.items():
            region: Any = call.target
            places = tuple(over.get(index) for index in range(len(region.writes)))
            call.target = alike.setdefault((region, places), region.writing_over(places))


def overwriting(
    program: Program,
    lives: Iterable[Lifetime],
    owner: Mapping[fx.Node, fx.Node] | None = None,
    stores: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
) -> dict[fx.Node, fx.Node]:
    """The calls that store their results over an operand in a program as it stands, and the operand of each.

    Args:
        program: functional, in any order.
        lives: its temporaries.
        owner, stores: what ``owners`` and ``storing`` give, for those who ask about one order of the calls after
            another.
    """
    owner = owners(program) if owner is None else owner
    stores = storing(program) if stores is None else stores
    joined = joinable(program)
    last = {life.node: life.last for life in lives if not life.is_beside}
    found: dict[fx.Node, fx.Node] = {}
    stored: dict[fx.Node, fx.Node] = {}  # by result, the memory that it lies in

    def memory_of(source: fx.Node) -> fx.Node:
        memory = owner[source]
        return stored.get(memory, memory)

    for position, node in enumerate(program.graph.nodes):
        if node not in stores:
            continue
        memories = list(map(memory_of, node.all_input_nodes))
        for result in stores[node]:
            for source, memory in zip(node.all_input_nodes, memories, strict=True):
                if source is joined.get(node):  # will not be there
                    continue
                is_free = last.get(memory) == position and memories.count(memory) == 1
                begins = node in joined or _begins_backward(node, result)
                if is_free and _fits(result, source, memory, begins) and _may_lie_over(node, result, source):
                    found[result], stored[result] = source, memory
                    last[memory] = last[result]
                    break
    return found


def storing(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Calls, with those of their results that may be stored over an operand; in whatever order they are."""
    joined = joinable(program)
    found = {node: [node] if node in joined else list(_stored(node)) for node in program.graph.nodes}
    return {node: results for node, results in found.items() if results}


def _stored(node: fx.Node) -> Iterator[fx.Node]:
    """The large results of a call that can be told where to store them; of a region, what unpacks them."""
    if isinstance(node.target, Region):
        first = {user.args[1]: user for user in reversed(list(node.users)) if user.target is operator.getitem}
        for index, each in first.items():
            may = _is_of_phase(node, results_of(node.target)[index].target)  # type: ignore[index]
            if may and own_bytes(each.meta["val"]) >= SMALLEST_BYTES:
                yield each
    elif _may_store(node):
        yield node


def _begins_backward(node: fx.Node, result: fx.Node) -> bool:
    """Whether a result is the gradient of a cross-entropy's logits, computed of what forward has kept."""
    if isinstance(node.target, Region):
        index: Any = result.args[1]
        return results_of(node.target)[index].target is aten._log_softmax_backward_data.default
    return ops.allocating(node.target) is ops.cross_entropy_backward


def _may_lie_over(node: fx.Node, result: fx.Node, source: fx.Node) -> bool:
    """Whether what a call stores may lie where an operand does, of those that may lie over one."""
    if result is node:
        return ops.allocating(node.target) is not ops.product_columns or source is node.args[0]
    region: Any = node.target
    return bool(region.may_overwrite(result.args[1], node.args.index(source)))


def _may_store(node: fx.Node) -> bool:
    """Whether a call computes one large tensor of others, part by part, and can be told where to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _is_of_phase(node, node.target):
        return False
    if out_overload(node.target) is None:
        return False
    tensors = [each.meta["val"] for each in (node, *node.all_input_nodes) if _is_tensor(each)]
    if not _is_tensor(node) or any(val.layout is not torch.strided or val.is_complex() for val in tensors):
        return False
    return own_bytes(node.meta["val"]) >= SMALLEST_BYTES and ops.may_overwrite(node)


def _is_of_phase(node: fx.Node, target: Any) -> bool:
    """Whether what an operator makes may lie over an operand in the phase of a call."""
    if phase_of(node) is Phase.BACKWARD or ops.allocating(target) is ops.product_columns:
        return True
    return phase_of(node) is Phase.FORWARD and ops.is_softmax(target)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


def _fits(node: fx.Node, source: fx.Node, memory: fx.Node, begins: bool) -> bool:
    """Whether an operand is all of some memory that a call's phase has made, in the form of its result.

    Args:
        begins: forward may have made it, too.
    """
    if memory.op != "call_function" or memory.target in ops.STARTS:
        return False
    if phase_of(memory) is not phase_of(node) and not (begins and phase_of(memory) is Phase.FORWARD):
        return False
    val, there = node.meta["val"], source.meta["val"]
    if not _is_tensor(source):
        return False
    alike = (val.shape, val.stride(), val.dtype) == (there.shape, there.stride(), there.dtype)
    is_whole = val.numel() * val.itemsize == own_bytes(memory.meta["val"])
    return alike and is_whole and (can_be_told(memory.target) or is_of_region(memory))
