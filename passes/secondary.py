"""Keep what forward has gathered within each node, so that backward need not gather it from all ranks (ZeRO++, hpZ)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from zgraph import ops
from zgraph.passes.gathers import gathers_of_params
from zgraph.passes.tidy import remove_dead
from zgraph.pipeline import Pass
from zgraph.program import SECONDARY, Mesh, Origin, Phase, Program, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepSecondaryShards(Pass):
    """Let a rank keep its part, among the ranks of its node, of each bucket that forward has gathered for backward.

        w = wait(all_gather(p, "data"))            w = wait(all_gather(p, "data"))
        y = mm(x, w)                               part = clone(shard(w, "secondary"))
        w = wait(all_gather(p, "data"))     ->     y = mm(x, w)
        gx = mm(gy, t(w))                          w = wait(all_gather(part, "secondary"))
                                                   gx = mm(gy, t(w))

    The second gather crosses no links between nodes. Parts are held from forward to backward: those of a node come to
    all parameters, in the dtype in which they travel. A bucket that backward alone reads, or in another dtype, is
    gathered from all ranks as before.
    """

    mesh: Mesh
    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        if SECONDARY not in self.mesh.axes:
            return
        size = self.mesh.axes[SECONDARY]
        gathered: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        for start, wait, param in gathers_of_params(program):
            origin: Origin = start.meta["origin"]
            key = param, wait.meta["val"].dtype
            if origin.phase is Phase.FORWARD:
                gathered[key] = wait
            elif key in gathered:
                whole = gathered[key]
                of_forward, before = whole.meta["origin"], whole.next
                part = program.call(ops.shard, whole, size, SECONDARY, origin=of_forward, before=before)
                kept = program.call(aten.clone.default, part, origin=of_forward, before=before)
                again = program.call(ops.all_gather, kept, size, SECONDARY, origin=origin, before=start)
                wait.replace_all_uses_with(program.call(ops.wait, again, origin=origin, before=start))
        remove_dead(program)
