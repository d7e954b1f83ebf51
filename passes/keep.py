"""Keep parameters whole from one micro-batch to the next."""

from __future__ import annotations

from dataclasses import dataclass

from zgraph.passes.gathers import gathers_of_params
from zgraph.passes.tidy import remove_dead
from zgraph.pipeline import Pass
from zgraph.program import Input, Program, Role, Stage


@dataclass(frozen=True)
class ReadGathered(Pass):
    """Read buckets that were gathered once for all micro-batches of a step, instead of gathering them.

        y = mm(x, view(wait(all_gather(shard))))    ->    y = mm(x, view(gathered))

    The runtime gathers them before a step's first micro-batch, and lets go of them behind its update.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        found = program.inputs(Role.GATHERED)
        for _, wait, param in gathers_of_params(program):
            what: Input = param.meta["input"]
            val = wait.meta["val"]
            at = what.name, str(val.dtype).removeprefix("torch.")
            if at not in found:
                found[at] = program.placeholder(Input(Role.GATHERED, *at), val)
            wait.replace_all_uses_with(found[at])
        remove_dead(program)
