"""Keep parameters whole from one micro-batch to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zgraph import ops
from zgraph.passes.tidy import remove_dead
from zgraph.pipeline import Pass
from zgraph.program import Input, Phase, Program, Role, Stage, operand


@dataclass(frozen=True)
class ReadGathered(Pass):
    """Read buckets that were gathered once for all micro-batches of a step, instead of gathering them.

        y = mm(x, view(wait(all_gather(shard))))    ->    y = mm(x, view(gathered))

    The runtime gathers them before a step's first micro-batch, and lets go of them behind its update.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        found = program.inputs(Role.GATHERED)
        for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
            if start.meta["origin"].phase is Phase.UPDATE:
                continue
            shard = operand(start)
            param = operand(shard) if shard.target is torch.ops.aten._to_copy.default else shard
            if param.op != "placeholder":
                continue
            what: Input = param.meta["input"]
            (wait,) = start.users
            val = wait.meta["val"]
            at = what.name, str(val.dtype).removeprefix("torch.")
            if what.role is Role.PARAM and at not in found:
                found[at] = program.placeholder(Input(Role.GATHERED, *at), val)
            if what.role is Role.PARAM:
                wait.replace_all_uses_with(found[at])
        remove_dead(program)
