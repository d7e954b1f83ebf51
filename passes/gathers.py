"""What a gather sends."""

from __future__ import annotations

from torch import fx

from zgraph.program import Role


def prepares(start: fx.Node) -> set[fx.Node] | None:
    """The calls that make what is sent of parameters alone, such as a cast of this rank's slice.

    Args:
        start: of a gather.

    Returns:
        None if something else is sent.
    """
    found: set[fx.Node] = set()
    stack = [start]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source.op == "placeholder" and source.meta["input"].role is not Role.PARAM:
                return None
            if source.op == "call_function" and source not in found:
                found.add(source)
                stack.append(source)
    return found
