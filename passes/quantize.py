"""Keep optimizer state in 8 bits an element."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zgraph import ops
from zgraph.packed import packed_numel
from zgraph.pipeline import Pass
from zgraph.program import Input, Origin, Phase, Program, Role, Stage
from zgraph.terms import Axiom, Term, Terms


def _packed_again(_: Terms, term: Term) -> Term | None:
    inner = term.args[0]
    return inner.args[0] if isinstance(inner, Term) and inner.target is ops.pack_state else None


@dataclass(frozen=True)
class QuantizeState(Pass):
    """Unpack the optimizer state that the layout has packed before the update reads it, and pack what is new.

        m' = lerp(m, g, w)    ->    m' = pack(lerp(unpack(m), g, w))

    This is not exact, and off by default: see ``zgraph.packed`` for the error of each step.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED
    assumes = (Axiom("unpack(pack(x)) = x", ops.unpack_state, _packed_again),)

    def rewrite(self, program: Program) -> None:
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        for node, what in program.placeholders():
            val = node.meta["val"]
            if not self._is_packed(program, what) or val.dim() != 1:
                continue
            node.meta["val"] = program.empty([packed_numel(len(val))], torch.uint8, val.device)
            readers = sorted((user for user in node.users if user.op == "call_function"), key=order.__getitem__)
            if readers:
                origin = Origin(Phase.UPDATE, what.name, readers[0].meta["origin"].source)
                wide = program.call(ops.unpack_state, node, origin=origin, before=readers[0])
                for reader in readers:
                    reader.replace_input_with(node, wide)
        results = program.results()
        for i, output in enumerate(program.outputs):
            if output is not None and self._is_packed(program, output) and results[i].op == "call_function":
                origin = results[i].meta["origin"]
                results[i] = program.call(ops.pack_state, results[i], origin=origin, before=results[i].next)
        program.set_results(results, program.outputs)

    def _is_packed(self, program: Program, what: Input) -> bool:
        assert program.layout is not None
        return what.role is Role.OPT_STATE and program.layout.packs(what.name, what.key)
