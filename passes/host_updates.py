"""Let the host's processors update what lies on the host, so that it need not come to the device and go back."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen.elementwise import results_of
from zgraph.codegen.host_kernel import HostKernel
from zgraph.codegen.kernel import Kernel, region
from zgraph.program import Origin, Phase, Program, Role, phase_of


def update_on_host(program: Program) -> int:
    """Move updates to where their parameters and state lie; what they need of the device goes there.

        p', m' = update(p, g, m)       t = spill(g)
                                ->     ...                                          # until the next bucket's update
                                       p', m' = update(p, wait(t), m)               # on the host, over p and m

    What an update does on the device alone stays there: of sums of gradients that lie there, their last addition. An
    update stays as a whole if the device needs its results in this step, if it writes something on the device that
    depends on what lies on the host, if no fewer bytes would move, or if no loop in C++ would be made of it.

    Args:
        program: after its last lowering, which knows what lies on the host.

    Returns:
        How many updates have moved.
    """
    updates = [node for node in program.graph.nodes if type(node.target) is Kernel and phase_of(node) is Phase.UPDATE]
    moving = [found for node in updates if (found := _Update.of(program, node)) is not None]
    there: dict[fx.Node, fx.Node] = {}
    for index, each in enumerate(moving):
        each.move(program, there, moving[index + 1].node if index + 1 < len(moving) else program.output_node)
    return len(moving)


@dataclass(frozen=True)
class _Update:
    """An update that can move.

    Attributes:
        node: the call of its kernel.
        moved: what runs on the host.
        takes: calls and inputs of the body that it is given.
        here: calls of the body that run on the device.
        crossing: calls and inputs of the body that the host needs of the device.
        stored, kept: results that are written over what lies on the host, and on the device, each with its index.
    """

    node: fx.Node
    moved: HostKernel
    takes: list[fx.Node]
    here: list[fx.Node]
    crossing: list[fx.Node]
    stored: dict[fx.Node, int]
    kept: dict[fx.Node, int]

    @classmethod
    def of(cls, program: Program, node: fx.Node) -> _Update | None:
        """None if it has to stay."""
        kernel = node.target
        assert isinstance(kernel, Kernel)
        takes = kernel.body.find_nodes(op="placeholder")
        on_host = {
            inner
            for inner, source in zip(takes, node.args, strict=True)
            if isinstance(source, fx.Node) and program.tier_of(source) == HostKernel.tier
        }
        calls = [inner for inner in kernel.body.nodes if inner.op == "call_function"]
        if not on_host or None in kernel.writes or any(map(_names_a_device, calls)):
            return None
        for inner in calls:
            if not on_host.isdisjoint(inner.all_input_nodes):
                on_host.add(inner)
        stored, kept = dict[fx.Node, int](), dict[fx.Node, int]()
        for index, (result, write) in enumerate(zip(results_of(kernel), kernel.writes, strict=True)):
            (stored if takes[write] in on_host else kept)[result] = index  # type: ignore[index]
        is_read = any(user.args[1] in stored.values() and _is_read(user) for user in node.users)
        if is_read or not stored or not on_host.isdisjoint(kept):
            return None
        there = [inner for inner in calls if inner in on_host or not kept]
        here = [inner for inner in calls if inner not in there]
        needed = dict.fromkeys(source for inner in there for source in inner.all_input_nodes)
        crossing = [source for source in needed if source not in on_host and source not in there]
        tensors = [source for source in crossing if isinstance(source.meta["val"], torch.Tensor)]
        if any(takes[kernel.writes[index]] in tensors for index in kept.values()):  # type: ignore[index]
            return None
        loaded = [
            inner for inner, source in zip(takes, node.args, strict=True) if inner in on_host and _is_state(source)
        ]
        if _num_bytes(tensors) >= _num_bytes([*loaded, *stored]):
            return None
        body, outside = region(there, list(stored))
        writes = tuple(outside.index(takes[kernel.writes[index]]) for index in stored.values())  # type: ignore[index]
        moved = HostKernel(f"{kernel.name}_on_host", body, len(outside), writes, kernel.is_compiled)
        return cls(node, moved, outside, here, tensors, stored, kept) if moved.is_fast else None

    def move(self, program: Program, there: dict[fx.Node, fx.Node], before: fx.Node) -> None:
        """Replace it.

        Args:
            there: what of the device is on the host already, which is added to.
            before: the call before which the host begins.
        """
        kernel, origin = self.node.target, self.node.meta["origin"]
        assert isinstance(kernel, Kernel)
        takes = kernel.body.find_nodes(op="placeholder")
        given: dict[fx.Node, Any] = dict(zip(takes, self.node.args, strict=True))
        if self.here:
            made = [inner for inner in self.crossing if inner.op == "call_function" and inner not in self.kept]
            results = [*self.kept, *made]
            body, outside = region(self.here, results)
            inputs = [given[inner] for inner in outside]
            places = [kernel.writes[index] for index in self.kept.values()]
            writes = (*(outside.index(takes[place]) for place in places), *(None for _ in made))  # type: ignore[index]
            first = Kernel(kernel.name, body, len(outside), writes, kernel.is_compiled)
            given |= zip(results, _call(program, first, inputs, origin, self.node), strict=True)
        for inner in self.crossing:
            value = given[inner]
            if value not in there:
                start = program.call(ops.spill, value, HostKernel.tier, origin=origin, before=self.node)
                there[value] = program.call(ops.wait, start, origin=origin, before=before)
        inputs = [there[given[inner]] if inner in self.crossing else given[inner] for inner in self.takes]
        given |= zip(self.stored, _call(program, self.moved, inputs, origin, before), strict=True)
        by_index = {index: given[result] for result, index in (*self.stored.items(), *self.kept.items())}
        for user in list(self.node.users):
            index = user.args[1]
            assert isinstance(index, int)
            user.replace_all_uses_with(by_index[index])
            program.graph.erase_node(user)
        program.graph.erase_node(self.node)


def _is_state(source: Any) -> bool:
    """Whether it comes to the device for its update alone, unlike parameters."""
    return bool(source.meta["input"].role is not Role.PARAM)


def _num_bytes(values: Iterable[fx.Node]) -> int:
    return sum(value.meta["val"].nbytes for value in values)


def _names_a_device(call: fx.Node) -> bool:
    return any(isinstance(arg, torch.device) for arg in (*call.args, *call.kwargs.values()))


def _is_read(result: fx.Node) -> bool:
    return any(user.op != "output" for user in result.users)


def _call(program: Program, kernel: Kernel, inputs: Sequence[Any], origin: Origin, before: fx.Node) -> list[fx.Node]:
    """The results of a call of a kernel."""
    with program.graph.inserting_before(before):
        call = program.graph.call_function(kernel, tuple(inputs))
        vals = tuple(result.meta["val"] for result in results_of(kernel))
        call.meta.update(val=vals, origin=origin)
        found = []
        for index, val in enumerate(vals):
            found.append(program.graph.call_function(operator.getitem, (call, index)))
            found[-1].meta.update(val=val, origin=origin)
    return found
