"""What has changed in a program since it was last looked at.

Passes may edit nodes directly, past ``Program``'s methods, so nobody records what they do: two looks at the nodes are
compared. What is the same object is the same: fx makes new arguments when they are assigned, and ``2 == 2.0``. So
values, origins and inputs are replaced, never edited; a kernel's body may be edited, and is always looked at.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from zgraph import ops
from zgraph.program import Program

_Seen = tuple[str, Any, Any, Any, Any, Any, Any, bool, list[fx.Node]]
"""A node: operation, target, arguments, keyword arguments, value, origin, input; may it write; the nodes it reads."""


class Look:
    """A program's nodes at one moment.

    Args:
        program: to look at.
        before: an earlier look at it; without one, everything counts as touched.

    Attributes:
        is_first: whether there was none before.
        touched: inputs and calls that were made or altered since, or that read a value that was, in order. What may
            write always is: the body of a kernel is a graph that may have changed.
        too_early: the first node that reads another before it is computed, if there is one.
    """

    def __init__(self, program: Program, before: Look | None = None) -> None:
        self.is_first = before is None
        self.touched: dict[fx.Node, None] = {}
        self.too_early: fx.Node | None = None
        self._seen: dict[fx.Node, _Seen] = {}
        earlier = {} if before is None else before._seen
        altered: set[fx.Node] = set()
        computed: set[fx.Node] = set()
        for node in program.graph.nodes:
            seen, op, target, args, kwargs, meta = (
                earlier.get(node), node.op, node.target, node.args, node.kwargs, node.meta,
            )  # fmt: skip
            val, origin, what = meta.get("val"), meta.get("origin"), meta.get("input")
            is_altered = is_touched = True
            if seen is not None:
                was_op, was_target, was_args, was_kwargs, was_val, was_origin, was_what, writes, reads = seen
                is_altered = not (was_val is val and was_origin is origin and was_what is what)
                same = was_target is target and was_args is args and was_kwargs is kwargs and was_op == op
                is_touched = is_altered or not same or writes or not altered.isdisjoint(reads)
            if is_altered:
                altered.add(node)
            if seen is None or is_touched:
                reads = node.all_input_nodes
                seen = op, target, args, kwargs, val, origin, what, ops.may_write(target), reads
                if op != "output":
                    self.touched[node] = None
            self._seen[node] = seen
            if not computed.issuperset(reads) and self.too_early is None:
                self.too_early = node
            computed.add(node)

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that a node reads."""
        return self._seen[node][-1]
