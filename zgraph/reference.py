"""What the ranks of a step must compute, whatever the passes do: the captured step with means over the ranks in it.

Passes turn what one rank computes into what all ranks compute together, so from there on a program cannot be compared
with the captured one as it is. Here the means are put where captured programs leave them out: where the update reads
what forward and backward have made, and where that is returned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from zgraph import lockstep, ops
from zgraph.lockstep import Values
from zgraph.program import Input, Phase, Program, Role

aten = torch.ops.aten


def averaged(captured: Program) -> Program:
    """The captured step as ranks must take it: update and optimizer state have mean gradients, the loss is the mean."""
    program = captured.clone()
    results = program.results()
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.meta["origin"].phase is Phase.UPDATE:
            continue
        updates = [
            u
            for u in node.users
            if u.op == "call_function" and u.meta["origin"].phase is Phase.UPDATE and u.target is not ops.max_over_ranks
        ]
        returned = [
            i
            for i, (what, result) in enumerate(zip(program.outputs, results, strict=True))
            if result is node and (what is None or what.role is Role.OPT_STATE)
        ]
        if updates or returned:
            origin = node.meta["origin"]
            start = program.call(ops.all_reduce, node, "avg", program.mesh.axis, origin=origin, before=node.next)
            mean = program.call(ops.wait, start, origin=origin, before=start.next)
            for user in updates:
                user.replace_input_with(node, mean)
            for i in returned:
                results[i] = mean
    program.set_results(results, program.outputs)
    for node in program.graph.find_nodes(op="call_function", target=ops.max_over_ranks):
        origin, source = node.meta["origin"], node.args[0]
        assert isinstance(source, fx.Node)
        start = program.call(ops.all_gather, source, 1, program.mesh.axis, origin=origin, before=node)
        every = program.call(ops.wait, start, origin=origin, before=node)
        rows = program.call(aten.view.default, every, [-1, len(source.meta["val"])], origin=origin, before=node)
        node.replace_all_uses_with(program.call(aten.amax.default, rows, [0], origin=origin, before=node))
        program.graph.erase_node(node)
    return program


def divide(program: Program, whole: Sequence[Values]) -> list[Values]:
    """Each rank's inputs of a program, from those of the captured one: as they are before there are buckets."""
    layout = program.layout
    if layout is None:
        return list(whole)
    inputs = {what: node.meta["val"] for node, what in program.placeholders()}
    flat = {
        Input(Role.OPT_STATE, segment.name, what.key)
        for what, val in inputs.items()
        if what.role is Role.OPT_STATE and isinstance(val, torch.Tensor) and val.dim()
        for bucket in layout.buckets
        if bucket.name == what.name
        for segment in bucket.segments
    }
    return lockstep.divide(layout, whole, flat)


def join(program: Program, results: Sequence[Values]) -> list[Values]:
    """Each rank's results of a program, as those of the captured one."""
    return list(results) if program.layout is None else lockstep.join(program.layout, results)
