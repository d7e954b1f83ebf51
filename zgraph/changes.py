"""What has changed in a program since it was last looked at.

Passes may edit nodes directly, past ``Program``'s methods, so nobody records what they do: two looks at the nodes are
compared. What is the same object is the same: fx makes new arguments when they are assigned, and ``2 == 2.0``. So
values, origins and inputs are replaced, never edited; a kernel's body may be edited, and is always looked at.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from zgraph import ops
from zgraph.program import Program, Stage

_Seen = tuple[str, Any, Any, Any, Any, Any, Any, bool, list[fx.Node]]
"""A node: operation, target, arguments, keyword arguments, value, origin, input; may it write; the nodes it reads."""


class Look:
    """A program's nodes at one moment.

    Args:
        program: to look at.
        before: the last look at it, whose record this one carries on; without one, everything counts as touched.

    Attributes:
        is_first: whether there was none before.
        touched: inputs and calls that were made or altered since, or that read a value that was, in order. What may
            write always is: the body of a kernel is a graph that may have changed.
        too_early: the first node that reads another before it is computed, if there is one.
        same_inputs: whether inputs, layout, mesh, and whether state is divided, are as they were.
        same_results: whether inputs, what is returned, and the recorded values of both are as they were.
    """

    def __init__(self, program: Program, before: Look | None = None) -> None:
        self.is_first = before is None
        self.touched: dict[fx.Node, None] = {}
        self.too_early: fx.Node | None = None
        self._seen: dict[fx.Node, _Seen] = {} if before is None else before._seen
        altered: set[fx.Node] = set()  # by another value, origin or input; and the list of results, by anything
        computed: set[fx.Node] = set()
        for node in program.graph.nodes:
            seen, op, target, args, kwargs, meta = (
                self._seen.get(node), node.op, node.target, node.args, node.kwargs, node.meta,
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
                self._seen[node] = op, target, args, kwargs, val, origin, what, ops.may_write(target), reads
                if op == "output":
                    altered.add(node)
                else:
                    self.touched[node] = None
            if not computed.issuperset(reads) and self.too_early is None:
                self.too_early = node
            computed.add(node)
        inputs = tuple(program.graph.find_nodes(op="placeholder"))
        divided = program.stage >= Stage.SHARDED
        self._frame = ((inputs, program.layout, program.mesh, divided), tuple(program.outputs))
        frame = (None, None) if before is None else before._frame
        self.same_inputs = self._frame[0] == frame[0] and altered.isdisjoint(inputs)
        self.same_results = self.same_inputs and self._frame[1] == frame[1] and program.output_node not in altered

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that a node reads."""
        return self._seen[node][-1]
