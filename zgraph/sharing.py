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


def shares_memory(program: Program) -> bool:
    """Whether a program reads parameters where all ranks have them."""
    return bool(program.graph.find_nodes(op="call_function", target=ops.share))


class Reads:
    """What a program reads, writes and starts, and when."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._at = {node: position for position, node in enumerate(program.graph.nodes)}
        self._written: dict[fx.Node, list[int]] = {}
        owner = owners(program)
        for node, position in self._at.items():
            for memory in written(node) if node.op == "call_function" else ():
                self._written.setdefault(owner[memory], []).append(position)
        self._collectives = [node for node in self._at if node.op == "call_function" and node.target in ops.STARTS]

    def may_be_shared(self, start: fx.Node) -> bool:
        """Whether the parameters that a gather sends could be read where all ranks have them."""
        shard = operand(start)
        return shard.op == "placeholder" and self._why_not(start, shard) is None

    def why_not(self, start: fx.Node) -> str | None:
        """What is wrong with reading parameters where all ranks have them, if anything is."""
        shard = operand(start)
        if shard.op != "placeholder":
            return f"shares {shard.name}, which is computed: only what lies in memory between steps is shared"
        return self._why_not(start, shard)

    def _why_not(self, start: fx.Node, shard: fx.Node) -> str | None:
        if shard.meta["input"].role is not Role.PARAM or self._program.tier_of(shard) is not None:
            return f"shares {shard.meta['input']}, which is no parameter in memory"
        (wait,) = start.users
        last = self._last_read(wait)
        end = len(self._at)
        write = min((at for at in self._written.get(shard, ()) if at > self._at[start]), default=end)
        for collective in self._collectives:
            (arrived,) = collective.users
            is_of_all = ops.axis_of(collective) in (ops.axis_of(start), self._program.mesh.axis)
            if is_of_all and last < self._at[collective] and self._at[arrived] < write:
                return None
        what = "this rank writes its part again" if write < end else "the step ends, and values may be loaded"
        return f"is read by others, and {what} without a collective in between that tells that they are done"

    def _last_read(self, value: fx.Node) -> int:
        """Where a value, or a view of it, is needed for the last time."""
        last, views, seen = self._at[value], [value], {value}
        while views:
            for user in views.pop().users:
                until = [user, *(user.users if user.target in ops.ASYNCHRONOUS else ())]
                last = max(last, *(self._at[each] for each in until))
                if user not in seen and ops.view_of(user) is not None:
                    seen.add(user)
                    views.append(user)
        return last
