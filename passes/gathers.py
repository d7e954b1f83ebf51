"""Gathers of parameters, and what they send."""

from __future__ import annotations

import torch
from torch import fx

from zgraph import ops
from zgraph.program import Phase, Program, Role, operand


def prepares(start: fx.Node) -> set[fx.Node] | None:
    """The calls that make what is sent of parameters alone, such as a cast of this rank's slice.

    Args:
        start: of a gather.

    Returns:
        None if something else is sent, such as a part of what has been gathered.
    """
    found: set[fx.Node] = set()
    stack = [start]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source.op == "placeholder" and source.meta["input"].role is not Role.PARAM:
                return None
            if source.target is ops.wait and operand(source).target is not ops.load:
                return None
            if source.op == "call_function" and source not in found:
                found.add(source)
                stack.append(source)
    return found


def gathers_of_params(program: Program) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """Before the update, each gather of a bucket of parameters or of a cast of one: start, wait, and the parameters."""
    found = []
    for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
        sent = operand(start)
        param = operand(sent) if sent.target is torch.ops.aten._to_copy.default else sent
        is_param = param.op == "placeholder" and param.meta["input"].role is Role.PARAM
        if is_param and start.meta["origin"].phase is not Phase.UPDATE:
            (wait,) = start.users
            found.append((start, wait, param))
    return found
