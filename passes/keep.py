"""Keep parameters whole from one micro-batch to the next."""

from __future__ import annotations

from dataclasses import dataclass

from zgraph import ops
from zgraph.passes.tidy import remove_dead
from zgraph.pipeline import Pass
from zgraph.program import Input, Phase, Program, Role, Stage, operand


@dataclass(frozen=True)
class ReadGathered(Pass):
    """Read buckets that were gathered once for all micro-batches of a step, instead of gathering them.

        y = mm(x, view(wait(all_gather(shard))))    ->    y = mm(x, view(gathered))

    The runtime gathers them when a step first reads them, and lets go of them behind its update.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        found = program.inputs(Role.GATHERED)
        for start in program.graph.find_nodes(op="call_function", target=ops.all_gather):
            shard = operand(start)
            param = shard if shard.op == "placeholder" or not shard.args else operand(shard)
            if start.meta["origin"].phase is Phase.UPDATE or param.op != "placeholder":
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
