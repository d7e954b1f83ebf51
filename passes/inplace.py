"""The last lowering: updates overwrite the state they replace.

Until here a program is functional. Now every bucket's update becomes one kernel that writes parameters and optimizer
state in place, and gathers of updated parameters land in the buffer the parameters live in.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen.elementwise import is_vector
from zgraph.codegen.kernel import Kernel, region
from zgraph.codegen.owned import OwnedUpdate
from zgraph.liveness import owners
from zgraph.passes.order import arrange
from zgraph.pipeline import Pass
from zgraph.program import OF_PARAMETERS, Origin, Phase, Program, Role, Stage, operand, update_nodes

aten = torch.ops.aten
_APART = frozenset(
    {
        *ops.STARTS, ops.wait, ops.shard, ops.elements, ops.pack_state, ops.unpack_state, ops.mean_of_quantized,
        operator.getitem,
    }
)  # fmt: skip
"""Operators whose vectors are no part of an elementwise update."""


@dataclass(frozen=True)
class UpdateInPlace(Pass):
    """Fuse each bucket's elementwise update into a kernel that writes over its inputs, as owned updates do, too.

    m' = lerp(m, g, w)
    u = div(m', sqrt(v'))        ->    p, m, v = kernel(p, g, m, v, w)    # in place
    p' = add(p, u)

    A kernel stands behind the last read of what it writes over. Results that lie in an input become copies.

    Attributes:
        compiled: kernels are in Triton or C++, where their operators can be written so.
    """

    compiled: bool = True
    takes, gives = Stage.SCHEDULED, Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        _own_results(program)
        donors = _donors(program)
        packs = {node: donors[node] for node in donors if node.target is ops.pack_state}
        for node, state in packs.items():
            unpacked = next((user for user in state.users if user.target is ops.unpack_state), None)
            if unpacked is not None:  # a kernel may write what is to be packed over what it was
                donors.setdefault(operand(node), unpacked)
        summed = _summed(program)
        fused = fused_updates(program)
        for name, update in update_nodes(program).items():
            nodes = fused.get(name, [])
            first = [node for node in nodes if node in summed]
            if first:
                _lend(first, donors)
                self._fuse(program, f"gradient_{name}", first, donors)
            self._fuse(program, f"update_{name}", [node for node in nodes if node not in summed], donors)
            for node in update:
                if isinstance(node.target, OwnedUpdate):
                    _write_over(node, node.target, donors)
        for node, state in packs.items():
            node.target, node.kwargs = ops.pack_state_into, {"out": state}
        params = program.inputs(Role.PARAM)
        for what, result in zip(program.outputs, program.results(), strict=True):
            if what is not None and what.role is Role.PARAM and result.target is ops.wait:
                start = operand(result)
                start.target = ops.all_gather_into
                start.kwargs = {"out": params[what.name, ""]}
        arrange(program, {node: i for i, node in enumerate(program.graph.nodes)})
        _unpack_late(program)

    def _fuse(self, program: Program, name: str, nodes: list[fx.Node], donors: dict[fx.Node, fx.Node]) -> None:
        """Replace ``nodes``, if there are any, by one kernel call that writes over the donors of its results."""
        if not nodes:
            return
        inside = set(nodes)
        leaving = [n for n in nodes if any(user not in inside for user in n.users)]
        body, outside = region(nodes, leaving)
        home = {_stored(source): i for i, source in enumerate(outside)}
        writes = tuple(home.get(donors[node]) if node in donors else None for node in leaving)
        origin = replace(nodes[-1].meta["origin"], made_by=self.name)
        kernel = Kernel(name, body, len(outside), writes, self.compiled)
        with program.graph.inserting_after(nodes[-1]):
            call = program.graph.call_function(kernel, tuple(outside))
        call.meta.update(val=tuple(n.meta["val"] for n in leaving), origin=origin)
        last = call
        for index, node in enumerate(leaving):
            with program.graph.inserting_after(last):
                last = program.graph.call_function(operator.getitem, (call, index))
            last.meta.update(val=node.meta["val"], origin=origin)
            node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in inside)
            for result in [result for result, donor in donors.items() if donor is node]:
                donors[result] = last
        for node in reversed(nodes):
            program.graph.erase_node(node)


def fused_updates(program: Program) -> dict[str, list[fx.Node]]:
    """By bucket, the calls of its update that kernels take the place of, where there are any; in order."""
    found = {
        name: [node for node in update if is_vector(node) and node.target not in _APART]
        for name, update in update_nodes(program).items()
    }
    return {name: nodes for name, nodes in found.items() if nodes}


def _unpack_late(program: Program) -> None:
    """Unpack state right before it is read, which may wait for a norm: unpacked, it takes four times as much.

    The same for what says where parameters are in it.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for target in (ops.shard, ops.elements, ops.unpack_state):
        for node in program.graph.find_nodes(op="call_function", target=target):
            if target is not ops.shard or operand(node).target is ops.elements:
                min(node.users, key=order.__getitem__).prepend(node)


def _write_over(call: fx.Node, update: OwnedUpdate, donors: dict[fx.Node, fx.Node]) -> None:
    """Let an owned update store its results in the state that they replace."""
    home = {_stored(source): i for i, source in enumerate(call.args) if isinstance(source, fx.Node)}
    results = {user.args[1]: user for user in call.users}
    writes = (home.get(donors[results[i]]) if results.get(i) in donors else None for i in range(len(update.dtypes)))
    call.target = replace(update, writes=tuple(writes))


def _stored(source: fx.Node) -> fx.Node:
    """The buffer that a rank's part is a part of."""
    return operand(source) if source.target is ops.shard else source


def _summed(program: Program) -> set[fx.Node]:
    """What a sum over all gradients is computed from, and so is computed before it."""
    found: set[fx.Node] = set()
    stack = list(program.graph.find_nodes(op="call_function", target=ops.add_up))
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def _lend(nodes: list[fx.Node], donors: dict[fx.Node, fx.Node]) -> None:
    """Let what leaves ``nodes`` lie in state that only they read, until a later result is written over it."""
    inside = set(nodes)
    for node in nodes:
        if node in donors or inside.issuperset(node.users):
            continue
        for result, donor in donors.items():
            if result not in inside and _is_alike(donor, node) and inside.issuperset(donor.users):
                donors[result], donors[node] = node, donor
                break


def _is_alike(donor: fx.Node, node: fx.Node) -> bool:
    """Whether one flat tensor can be written over the other."""
    there, val = donor.meta["val"], node.meta["val"]
    return is_vector(donor) and there.shape == val.shape and there.dtype == val.dtype


def _own_results(program: Program) -> None:
    """Give the loss and new buffers memory of their own where they lie in an input's, which may be written over."""
    results = program.results()
    owner = owners(program)
    for index, (what, result) in enumerate(zip(program.outputs, results, strict=True)):
        if what is not None and what.role not in (Role.BUFFER, Role.CONSTANT):
            continue  # bucketing sees to parameters and optimizer state
        if not isinstance(result, fx.Node) or not isinstance(result.meta["val"], torch.Tensor):
            continue
        memory = owner[result]
        if memory.op == "placeholder" and not (result is memory and what == memory.meta["input"]):
            origin = result.meta.get("origin", Origin(Phase.FORWARD))
            results[index] = program.call(aten.clone.default, result, origin=origin, before=program.output_node)
    program.set_results(results, program.outputs)


def _donors(program: Program) -> dict[fx.Node, fx.Node]:
    """Nodes that are the new value of a state input, or of this rank's part of it, and that input."""
    inputs = {what: node for node, what in program.placeholders()}
    found: dict[fx.Node, fx.Node] = {}
    for what, result in zip(program.outputs, program.results(), strict=True):
        if what in inputs and what.role in OF_PARAMETERS and isinstance(result, fx.Node):
            found[operand(operand(result)) if result.target is ops.wait else result] = inputs[what]
    return found
