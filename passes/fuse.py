"""Make one kernel of calls that go over the same memory one after another.

What one call of forward or backward writes, and the next one reads, need not lie in memory: ``zgraph.codegen.grouping``
says which calls can be one, ``zgraph.codegen.lowering`` what they are as loops. The schedule is made before: no
collective starts later, and no step holds more tensors at its peak. A call that joins a later one may move behind a
wait. Whether a kernel is faster than its calls is for the machine to say, where it is known.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen import inductor
from zgraph.codegen.grouping import Group, body_of, groups
from zgraph.codegen.inductor import InductorRegion
from zgraph.codegen.kernel import calls_of
from zgraph.codegen.numbers import Numbers, is_of_numbers
from zgraph.codegen.region import Region, can_write, key_of
from zgraph.cost import Costs
from zgraph.hardware import Hardware
from zgraph.liveness import held_bytes, lifetimes, owners
from zgraph.passes.order import arrange
from zgraph.pipeline import Pass
from zgraph.program import Program, Stage, Weighed
from zgraph.timeline import COMPUTE, Lanes

MORE = 1 / 256
"""Part of the peak by which kernels may raise it: the small results of one, such as gradients of biases, are there all
at once."""


@dataclass(frozen=True)
class FuseRegions(Pass):
    """Make kernels of elementwise calls, norms, softmax, losses and sums that feed each other, and of single numbers.

    h = add(x, y)
    n, mean, rstd = native_layer_norm(h, ...)    ->    h, n, mean, rstd = fused_add_native_layer_norm(x, y, ...)

    What is computed is the same, but for how it is rounded. Regions that compute alike are one kernel. Where a region
    would raise the peak, or is predicted to take as long as its calls or longer, these stay as they are:
    ``program.weighed`` says which and why.

    Attributes:
        then: the passes that lower the program further; the peak is that of what they give, and so are the costs.
        hardware: the machine that says what is faster; None takes every region to be.
        compilers: who makes kernels: ``"zgraph"`` or ``"inductor"``, each of what those before it have no words for.
    """

    then: tuple[Pass, ...] = ()
    hardware: Hardware | None = None
    compilers: tuple[str, ...] = ("zgraph",)
    takes = gives = Stage.SCHEDULED

    def rewrite(self, program: Program) -> None:
        layout = program.layout
        device_types = {bucket.device.type for bucket in layout.buckets} if layout is not None else set()
        if len(device_types) != 1:
            return
        (device_type,) = device_types
        kept: set[fx.Node] = set()
        program.weighed = ()
        plain: _Lowered | None = None
        for compiler in self.compilers:
            weighed, plain = self._chosen(program, compiler, device_type, kept, plain)
            program.weighed += weighed

    def _chosen(
        self, program: Program, compiler: str, device_type: str, kept: set[fx.Node], plain: _Lowered | None
    ) -> tuple[tuple[Weighed, ...], _Lowered | None]:
        """Make kernels of what one compiler has words for.

        Args:
            program: to be changed.
            compiler: one of ``compilers``.
            device_type: where the program computes.
            kept: calls that stay as they are, which more may become.
            plain: the program as it will run, if that is known.

        Returns:
            What was weighed, and the changed program as it will run, if that is known.
        """
        may_write = partial(_CAN_WRITE[compiler], device_type=device_type)
        found = groups(program, may_write, kept)
        if not found:
            return (), plain
        changed = plain = plain or self._lowered(program)
        bound = int(max(plain.held) * (1 + MORE))
        position = {node: index for index, node in enumerate(program.graph.nodes)}
        weighed: dict[int, Weighed] = {}  # by where the last of its calls is
        part = 1  # then one half, a quarter: of a recurrent layer, each step may have a region that adds little
        while found:
            trial = program.clone()
            twins = dict(zip(program.graph.nodes, trial.graph.nodes, strict=True))
            calls = _fuse(trial, [_twin(group, twins) for group in found], compiler)
            fused = self._lowered(trial)
            guilty = _guilty(fused, calls, bound, part)
            compiling_s = _compiling_s(calls)
            verdicts = [
                replace(self._verdict(group, plain, call, fused), compiling_s=compiling_s[call])
                for group, call in zip(found, calls, strict=True)
            ]
            if guilty and all(verdict.is_kernel for verdict in verdicts):
                raised_by = max(fused.held) - max(plain.held)
                for index in guilty:
                    verdicts[index] = replace(verdicts[index], raises_peak_by=raised_by)
                part *= 2
            refused = [(g, v) for g, v in zip(found, verdicts, strict=True) if not v.is_kernel]
            for group, verdict in refused:
                weighed[position[group.nodes[-1]]] = replace(verdict, name=verdict.name.rpartition("_")[0])
            kept.update(node for group, _ in refused for node in group.nodes)
            if not refused:
                weighed |= {position[g.nodes[-1]]: v for g, v in zip(found, verdicts, strict=True)}
                _fuse(program, found, compiler)
                changed = fused.of_another(dict(zip(program.graph.nodes, trial.graph.nodes, strict=True)))
                break
            found = groups(program, may_write, kept)
        return tuple(weighed[at] for at in sorted(weighed)), changed

    def _verdict(self, group: Group, plain: _Lowered, call: fx.Node, fused: _Lowered) -> Weighed:
        """Whether a region is faster than its calls."""
        region: Any = call.target
        last = group.nodes[-1].meta["origin"]
        about = Weighed(region.name, last.module, calls_of(region.body))
        if self.hardware is None:
            return about
        kernel_s = _seconds([fused.twins[call]], fused.program, self.hardware)
        calls = [plain.twins[node] for node in group.nodes if node in plain.twins]  # of two that joined, one is left
        calls_s = _seconds(calls, plain.program, self.hardware)
        return replace(about, kernel_s=kernel_s, calls_s=calls_s)

    def _lowered(self, program: Program) -> _Lowered:
        lowered = program.clone()
        twins = dict(zip(program.graph.nodes, lowered.graph.nodes, strict=True))
        for each in self.then:
            each.rewrite(lowered)
            lowered.stage = each.gives
        return _Lowered(lowered, twins)


class _Lowered:
    """A program as it will run.

    Attributes:
        program: that.
        twins: where the nodes of the program that it is made of are in it, as far as they are.
        lives: its temporaries.
        held: their bytes, at each node.
    """

    def __init__(self, program: Program, twins: Mapping[fx.Node, fx.Node]) -> None:
        here = set(program.graph.nodes)
        self.program, self.twins = program, {node: twin for node, twin in twins.items() if twin in here}
        self.lives = lifetimes(program)
        self.held = held_bytes(self.lives, len(program.graph.nodes))

    def of_another(self, same: Mapping[fx.Node, fx.Node]) -> _Lowered:
        """The same for a program whose nodes are like those that it was made of, given each with the one it is like."""
        another = copy.copy(self)
        another.twins = {node: self.twins[like] for node, like in same.items() if like in self.twins}
        return another


def _guilty(lowered: _Lowered, calls: Sequence[fx.Node], bound: int, part: int) -> set[int]:
    """Regions, by index, that hold most where more is held than the bound.

    Args:
        lowered: the program with them.
        calls: of the regions.
        bound: bytes.
        part: what a region holds beyond what its calls would is taken to be one in so many of its bytes. As many
            regions are taken as make up what is held too much, first of all at the peak, then at each place where none
            of these is alive.
    """
    owner, lives = owners(lowered.program), {life.node: life for life in lowered.lives}
    touched = []
    for call in map(lowered.twins.__getitem__, calls):
        memories = {owner[node] for node in (call, *call.all_input_nodes, *call.users)}
        touched.append([lives[memory] for memory in memories if memory in lives])

    def held(index: int, at: int) -> int:
        return sum(life.num_bytes for life in touched[index] if life.first <= at <= life.last)

    found: set[int] = set()
    over = [at for at, num_bytes in enumerate(lowered.held) if num_bytes > bound]
    for at in sorted(over, key=lowered.held.__getitem__, reverse=True):
        if any(held(index, at) for index in found):
            continue
        too_much = (lowered.held[at] - bound) * part
        for count, index in enumerate(sorted(range(len(calls)), key=lambda index: held(index, at), reverse=True)):
            num_bytes = held(index, at)
            if too_much <= 0 or (count and not num_bytes):
                break
            found.add(index)
            too_much -= num_bytes
    return found


def _compiling_s(calls: Sequence[fx.Node]) -> dict[fx.Node, float]:
    """Of each call of a region, what compiling it takes of a step: those that are alike are compiled once."""
    alike = Counter(call.target for call in calls)
    per_step = inductor.COMPILE_S / inductor.NUM_STEPS
    return {c: per_step / alike[c.target] if isinstance(c.target, InductorRegion) else 0.0 for c in calls}


def _seconds(nodes: Iterable[fx.Node], program: Program, hardware: Hardware) -> float:
    """How long calls take one after the other, from the first being started."""
    costs, lanes = Costs(program, hardware), Lanes(hardware)
    for node in nodes:
        lanes.run(costs.of(node), COMPUTE)
    return lanes.end


def _twin(group: Group, twins: Mapping[fx.Node, fx.Node]) -> Group:
    return Group(tuple(twins[n] for n in group.nodes), tuple(twins[n] for n in group.results), group.place)


_KINDS: dict[str, type[Region]] = {"zgraph": Region, "inductor": InductorRegion}
_CAN_WRITE: dict[str, Callable[..., bool]] = {"zgraph": can_write, "inductor": inductor.can_write}


def _fuse(program: Program, found: Iterable[Group], compiler: str) -> list[fx.Node]:
    """Replace groups by calls of regions.

    Returns:
        The calls, in the order of the groups.
    """
    position = {node: float(index) for index, node in enumerate(program.graph.nodes)}
    regions: dict[Any, Region] = {}
    first = len({node.target for node in program.graph.nodes if isinstance(node.target, Region)})
    calls = []
    for group in found:
        body, outside = body_of(group.nodes, group.results)
        key = key_of(body)
        if key not in regions:
            name = f"{_stem(body)}_{first + len(regions)}"
            kind = Numbers if is_of_numbers(body) else _KINDS[compiler]
            regions[key] = kind(name, body, len(outside), (None,) * len(group.results), is_compiled=True)
        call = _replace(program, group, regions[key], outside)
        position.update(dict.fromkeys((call, *call.users), group.place))
        calls.append(call)
    arrange(program, {n: position[n] for n in program.graph.nodes if n.op == "call_function"})
    return calls


def _replace(program: Program, group: Group, region: Region, outside: list[fx.Node]) -> fx.Node:
    """One call in the place of a group."""
    unneeded = {*group.nodes, *(view for node in group.nodes for view in _views(node))}
    last = group.nodes[-1]
    origin = replace(last.meta["origin"], made_by=FuseRegions.__name__)
    with program.graph.inserting_before(program.output_node):
        call = program.graph.call_function(region, tuple(outside))
        call.meta.update(val=tuple(node.meta["val"] for node in group.results), origin=origin)
        for index, node in enumerate(group.results):
            part = program.graph.call_function(operator.getitem, (call, index))
            part.meta.update(val=node.meta["val"], origin=replace(node.meta["origin"], made_by=FuseRegions.__name__))
            node.replace_all_uses_with(part)
    for node in reversed(list(program.graph.nodes)):
        if node in unneeded and not node.users:
            program.graph.erase_node(node)
    return call


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """Views of a value, and of these."""
    for user in node.users:
        if ops.view_of(user) is not None:
            yield user
            yield from _views(user)


def _stem(body: fx.Graph) -> str:
    """What a region is called: its operators, as far as they fit into a line."""
    targets = [node.target for node in body.nodes if isinstance(node.target, torch._ops.OpOverload)]
    names = list(dict.fromkeys(t.overloadpacket.__name__.strip("_") for t in targets if not ops.is_view(t)))
    return "fused_" + "_".join(names)[:60].strip("_")
