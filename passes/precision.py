"""Let parameters travel in the precision in which they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from zgraph import ops
from zgraph.pipeline import Pass
from zgraph.program import Program, Stage, operand

aten = torch.ops.aten


@dataclass(frozen=True)
class CastBeforeGather(Pass):
    """Cast a rank's slice of a bucket, not the whole of it, where all that reads the bucket reads it through that cast.

        w = to(view(wait(all_gather(shard))), bf16)    ->    w = view(wait(all_gather(to(shard, bf16))))

    Half the bytes travel and are held. Elements are cast one by one, so what is read is the same.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
            (wait,) = (user for user in start.users if user.target is ops.wait)
            found = _casts(wait)
            if found is not None:
                self._cast_first(program, start, wait, *found)

    def _cast_first(
        self, program: Program, start: fx.Node, wait: fx.Node, views: list[fx.Node], casts: list[fx.Node]
    ) -> None:
        dtype = casts[0].meta["val"].dtype
        low = program.call(
            aten._to_copy.default, operand(start), dtype=dtype, origin=start.meta["origin"], before=start
        )
        start.replace_input_with(operand(start), low)
        for node in (start, wait, *views):
            node.meta["val"] = program.infer(node)
        for cast in casts:
            cast.replace_all_uses_with(operand(cast))
            program.graph.erase_node(cast)


def _casts(whole: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """The views of a gathered bucket, and the casts through which all that reads them does; None if some does not."""
    views: list[fx.Node] = []
    casts: list[fx.Node] = []
    stack = [whole]
    while stack:
        source = stack.pop()
        for user in source.users:
            if user.op == "call_function" and user.target is aten._to_copy.default:
                casts.append(user)
            elif ops.view_of(user) is source and len(user.all_input_nodes) == 1:
                views.append(user)
                stack.append(user)
            else:
                return None
    dtypes = {cast.meta["val"].dtype for cast in casts}
    by_place = any(user.target in ops.BY_PLACE for cast in casts for user in cast.users)
    if len(dtypes) != 1 or by_place or next(iter(dtypes)).itemsize >= whole.meta["val"].dtype.itemsize:
        return None
    alike = all(cast.meta["val"].stride() == operand(cast).meta["val"].stride() for cast in casts)
    return (views, casts) if alike else None
