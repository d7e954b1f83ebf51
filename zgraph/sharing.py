"""When ranks may read each other's parts of a bucket where they lie: nobody writes his part while others read it.

Ranks run one program, each at its own pace. What a rank has read of a bucket before it starts a collective, no rank
reads any more once that collective has been waited for: a wait returns when all have started. So between the last read
of what is shared and the first call that writes a part again, there has to be a collective, start and wait, of those
who share or of all ranks. Where a program writes nothing, its end counts as a write: then values may be loaded.
"""

from __future__ import annotations

from torch import fx

from zgraph import ops
from zgraph.liveness import owners, written
from zgraph.program import Program, Role, operand


def shares(program: Program) -> list[fx.Node]:
    """The calls that start to read parameters where all ranks have them."""
    return list(program.graph.find_nodes(op="call_function", target=ops.share))


class Reads:
    """What a program reads, writes and starts, and when."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._at = at = {node: position for position, node in enumerate(program.graph.nodes)}
        self._last: dict[fx.Node, int] = {}  # where a value, or a view of it, is needed for the last time
        self._written: dict[fx.Node, list[int]] = {}
        owner = owners(program)
        for node, position in at.items():
            is_sent = node.target in ops.ASYNCHRONOUS
            until = max([position, *(at[wait] for wait in node.users)]) if is_sent else position
            for root in map(ops.root_of, node.all_input_nodes):
                self._last[root] = max(self._last.get(root, 0), until)
            for memory in written(node) if node.op == "call_function" else ():
                self._written.setdefault(owner[memory], []).append(position)
        self._collectives = [node for node in at if node.op == "call_function" and node.target in ops.STARTS]

    def why_not(self, start: fx.Node) -> str | None:
        """What is wrong with reading what a gather sends where all ranks have it, if anything is."""
        shard = operand(start)
        if shard.op != "placeholder":
            return f"shares {shard.name}, which is computed: only what lies in memory between steps is shared"
        if shard.meta["input"].role is not Role.PARAM or self._program.tier_of(shard) is not None:
            return f"shares {shard.meta['input']}, which is no parameter in memory"
        (wait,) = start.users
        last, end = self._last.get(wait, self._at[wait]), len(self._at)
        write = min((at for at in self._written.get(shard, ()) if at > self._at[start]), default=end)
        for collective in self._collectives:
            (arrived,) = collective.users
            is_of_all = ops.axis_of(collective) in (ops.axis_of(start), self._program.mesh.axis)
            if is_of_all and last < self._at[collective] and self._at[arrived] < write:
                return None
        what = "this rank writes its part again" if write < end else "the step ends, and values may be loaded"
        return f"is read by others, and {what} without a collective in between that tells that they are done"
