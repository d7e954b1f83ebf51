"""Keep optimizer state in 8 bits an element."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from zgraph import ops
from zgraph.packed import packed_numel
from zgraph.pipeline import Pass
from zgraph.program import Input, Origin, Phase, Program, Role, Stage, update_nodes
from zgraph.terms import Axiom, Form, Term, Terms, is_input, zero_times

aten = torch.ops.aten


def _packed_before(terms: Terms, term: Term) -> Term | None:
    """What was packed, if it is optimizer state as the step has found it, and nothing that it has computed."""
    packed = term.args[0]
    if not isinstance(packed, Term) or packed.target is not ops.pack_state:
        return None
    state: Term = packed.args[0]
    whole = state.args[0] if state.target is Form.SHARD else state
    given = all(zero_times(base) == frozenset() or is_input(base, Role.OPT_STATE) for base, _, _ in terms.pieces(whole))
    return state if given else None


def elements_of(program: Program, bucket: str, part: fx.Node, origin: Origin, before: fx.Node) -> fx.Node:
    """Where a bucket, or this rank's part of it if ``part`` is one, has elements of parameters."""
    assert program.layout is not None
    flat, mesh, val = program.layout.by_name[bucket], program.mesh, part.meta["val"]
    found = program.call(ops.elements, *flat.ranges(), flat.numel, device=val.device, origin=origin, before=before)
    if len(val) == flat.numel:
        return found
    return program.call(ops.shard, found, mesh.shard_size, mesh.shard_axis, origin=origin, before=before)


@dataclass(frozen=True)
class QuantizeState(Pass):
    """Unpack the optimizer state that the layout has packed before the update reads it, and pack what is new.

        m' = lerp(m, g, w)    ->    m' = pack(where(elements, lerp(unpack(m), g, w), 0))

    Elements are those of parameters: what an update makes of padding would set the scale of others in its block.
    This is not exact, and off by default: see ``zgraph.packed`` for the error of each step.
    """

    takes, gives = Stage.SHARDED, Stage.SHARDED
    assumes = (Axiom("unpack(pack(x)) = x", ops.unpack_state, _packed_before),)

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
        results, elements = program.results(), dict[str, fx.Node]()
        for i, output in enumerate(program.outputs):
            if output is not None and self._is_packed(program, output) and results[i].op == "call_function":
                new, origin = results[i], replace(results[i].meta["origin"], module=output.name)
                before, val = new.next, new.meta["val"]
                if output.name not in elements:
                    first = update_nodes(program)[output.name][0]
                    elements[output.name] = elements_of(program, output.name, new, origin, first)
                zero = program.call(
                    aten.zeros.default, [], dtype=val.dtype, device=val.device, origin=origin, before=before
                )
                kept = program.call(aten.where.self, elements[output.name], new, zero, origin=origin, before=before)
                results[i] = program.call(ops.pack_state, kept, origin=origin, before=before)
        program.set_results(results, program.outputs)

    def _is_packed(self, program: Program, what: Input) -> bool:
        assert program.layout is not None
        return what.role is Role.OPT_STATE and program.layout.packs(what.name, what.key)
