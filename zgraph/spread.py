"""How each value of a step lies over the ranks: the same on all, a part on each, or each rank's own.

These are DTensor's placements, Replicate, Shard and Partial, of whole programs, whose state lies in flat buffers. What
each rank computes of its own rows of the batch counts as its own, and so does a gradient before it has been averaged.
It is for people who look at a step: the verifier (``zgraph.terms``) knows more, and proves it.
"""

from __future__ import annotations

import enum

from torch import fx

from zgraph import ops
from zgraph.program import REPLICA, Input, Phase, Program, Role, Stage, phase_of


class Spread(enum.Enum):
    """How a value lies over the ranks, in a word; what reads several lies as the last of them in this order."""

    REPLICATED = "replicated"
    SHARDED = "sharded"
    PER_RANK = "per rank"


_ORDER = list(Spread)

_AFTER = {
    ops.all_gather: Spread.REPLICATED,
    ops.all_gather_into: Spread.REPLICATED,
    ops.share: Spread.REPLICATED,
    ops.max_over_ranks: Spread.REPLICATED,
    ops.all_to_all: Spread.PER_RANK,
}

_REDUCE = (ops.reduce_scatter, ops.mean_of_quantized)


def spread_of(program: Program) -> dict[fx.Node, Spread]:
    """How each value lies; nothing for a step of one rank, once it is known to be one.

    Before gradients are averaged explicitly, the update is that of all ranks: averaging is implied.

    Args:
        program: at any stage.
    """
    if program.mesh.size == 1 and program.stage >= Stage.SHARDED:
        return {}
    found: dict[fx.Node, Spread] = {}
    reduced: set[fx.Node] = set()  # this rank's part of a mean, and what is computed of it
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = _of_input(program, node.meta["input"], node)
        elif node.op == "call_function":
            if node.target in _REDUCE or not reduced.isdisjoint(node.all_input_nodes):
                reduced.add(node)
            found[node] = _of_call(program, node, found, reduced)
    return found


def _of_input(program: Program, what: Input, node: fx.Node) -> Spread:
    layout = program.layout
    if what.role in (Role.BATCH, Role.BUFFER):
        return Spread.PER_RANK
    if layout is None or what.name not in layout.by_name or not getattr(node.meta.get("val"), "ndim", 0):
        return Spread.REPLICATED
    is_divided = {
        Role.PARAM: layout.shard_params,
        Role.OPT_STATE: layout.shard_state,
        Role.GRADIENT: layout.shard_state,
    }.get(what.role, False)
    return Spread.SHARDED if is_divided and program.mesh.shard_size > 1 else Spread.REPLICATED


def _of_call(program: Program, node: fx.Node, found: dict[fx.Node, Spread], reduced: set[fx.Node]) -> Spread:
    if program.stage < Stage.SHARDED and phase_of(node) is Phase.UPDATE:
        return Spread.REPLICATED
    if node.target in _AFTER:
        return _AFTER[node.target]
    reads = max((found[each] for each in node.all_input_nodes), key=_ORDER.index, default=Spread.REPLICATED)
    mesh = program.mesh
    if node.target in _REDUCE:
        # Where a part of the ranks divides state, those that have the same part are still to take the mean of theirs.
        return Spread.PER_RANK if mesh.has_levels else Spread.SHARDED
    if node.target is ops.all_reduce:
        is_part = mesh.has_levels and ops.axis_of(node) == REPLICA and node in reduced
        return Spread.SHARDED if is_part else Spread.REPLICATED
    if ops.draws(node):
        return Spread.PER_RANK
    return max(reads, Spread.SHARDED, key=_ORDER.index) if node.target is ops.shard else reads


__all__ = ["Spread", "spread_of"]
