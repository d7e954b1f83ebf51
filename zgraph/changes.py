"""What has changed in a program since it was last looked at.

Passes may edit nodes directly, past ``Program``'s methods, so nobody records what they do: two looks at the nodes are
compared. What is the same object is the same: fx makes new arguments when they are assigned, and ``2 == 2.0``.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from zgraph import ops
from zgraph.program import Program

_Seen = tuple[Any, Any, Any, Any, Any, bool, list[fx.Node]]
"""A node: target, arguments, keyword arguments, value, origin or input; whether it may write; the nodes it reads."""


class Look:
    """A program's nodes at one moment.

    Args:
        program: to look at.
        before: an earlier look at it; without one, everything counts as touched.

    Attributes:
        touched: inputs and calls that were made or altered since, or that read a value that was, in order. What may
            write always is: the body of a kernel is a graph that may have changed.
        too_early: the first node that reads another before it is computed, if there is one.
    """

    def __init__(self, program: Program, before: Look | None = None) -> None:
        self.touched: dict[fx.Node, None] = {}
        self.too_early: fx.Node | None = None
        self._seen: dict[fx.Node, _Seen] = {}
        earlier = {} if before is None else before._seen
        altered: set[fx.Node] = set()
        computed: set[fx.Node] = set()
        for node in program.graph.nodes:
            seen, target, args, kwargs, meta = earlier.get(node), node.target, node.args, node.kwargs, node.meta
            val, origin = meta.get("val"), meta.get("origin") or meta.get("input")
            if seen is None or seen[3] is not val or seen[4] is not origin:
                altered.add(node)
                touched = True
            else:
                same = seen[0] is target and seen[1] is args and seen[2] is kwargs
                touched = not same or seen[5] or not altered.isdisjoint(seen[6])
            if touched or seen is None:
                seen = target, args, kwargs, val, origin, ops.may_write(target), node.all_input_nodes
                if node.op != "output":
                    self.touched[node] = None
            self._seen[node] = seen
            if not computed.issuperset(seen[6]) and self.too_early is None:
                self.too_early = node
            computed.add(node)
