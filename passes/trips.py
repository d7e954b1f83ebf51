"""What a step makes, and does not need for a while, goes to a lower tier and comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from zgraph import ops
from zgraph.liveness import owners
from zgraph.program import Phase, Program, Target, operand, phase_of


@dataclass(frozen=True)
class Idle:
    """Memory that nothing needs for a while.

    Attributes:
        family: positions in the graph of the call that makes what lies there, or has written over what lay there
            before, and of views of that.
        read: position of the last call that needs it before that while.
        again: of the first one behind it.
        num_bytes: of it.
    """

    family: tuple[int, ...]
    read: int
    again: int
    num_bytes: int

    @property
    def first(self) -> int:
        """Where it is made."""
        return self.family[0]


@dataclass(frozen=True)
class Trip:
    """To a lower tier and back.

    Attributes:
        idle: what goes.
        stored_at, load_at: positions of the calls before which it has gone, and before which it begins to come.
    """

    idle: Idle
    stored_at: int
    load_at: int


def families(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """By the node that allocated it, all that lies in some memory, in order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, owner in owners(program).items():
        found.setdefault(owner, []).append(node)
    return found


def last_value(family: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """Of what lies in some memory, in order, what is written there last, and views of it."""
    return family[max(i for i, node in enumerate(family) if i == 0 or ops.view_of(node) is None) :]


def readers_of(family: Sequence[fx.Node]) -> set[fx.Node]:
    """The calls that read memory, itself or through views of it."""
    return {user for node in family for user in node.users} - set(family)


def done_at(reader: fx.Node, place: Mapping[fx.Node, int]) -> int:
    """The position from which on a call needs no more what it has read: what is sent has to have arrived."""
    waits = reader.users if reader.target in ops.ASYNCHRONOUS else ()
    return max([place[reader], *(place[wait] for wait in waits)])


def make(program: Program, trips: Sequence[Trip], tier: str) -> None:
    """Let trips be made."""
    nodes = list(program.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    made: dict[Trip, fx.Node] = {}

    def add(target: Target, trip: Trip, at: int, *args: Any) -> None:
        kept = nodes[trip.idle.first]
        origin = replace(kept.meta["origin"], phase=_phase(kept, nodes[at]))
        made[trip] = program.call(target, *args, origin=origin, before=nodes[at])

    for trip in sorted(trips, key=lambda trip: trip.idle.read):
        add(ops.spill, trip, trip.idle.read + 1, nodes[trip.idle.first], tier)
    for trip in sorted(trips, key=lambda trip: trip.stored_at):
        add(ops.wait, trip, trip.stored_at, made[trip])
    for trip in sorted(trips, key=lambda trip: (trip.load_at, trip.idle.again)):
        add(ops.load, trip, trip.load_at, made[trip], tier)
    for trip in trips:
        add(ops.wait, trip, trip.idle.again, made[trip])
        family = [nodes[at] for at in trip.idle.family]
        views = {family[0]: made[trip]}
        for reader in sorted(readers_of(family) & place.keys(), key=place.__getitem__):
            if place[reader] >= trip.idle.again:
                for source in reader.all_input_nodes:
                    if source in family:
                        reader.replace_input_with(source, _view(program, source, views, reader))
        for node in reversed(family[1:]):
            if not node.users:
                program.graph.erase_node(node)


def _phase(kept: fx.Node, before: fx.Node) -> Phase:
    """Of what becomes of a value before some call: what an update has made is that of all ranks, all else its own."""
    if phase_of(kept) is Phase.UPDATE:
        return Phase.UPDATE
    return Phase.FORWARD if phase_of(before) is Phase.FORWARD else Phase.BACKWARD


def _view(program: Program, node: fx.Node, views: dict[fx.Node, fx.Node], before: fx.Node) -> fx.Node:
    """The like of a view of memory, of what was loaded; made before a call if there is none yet."""
    if node not in views:
        source = _view(program, operand(node), views, before)
        origin = replace(node.meta["origin"], phase=_phase(node, before))
        views[node] = program.call(node.target, source, *node.args[1:], origin=origin, before=before, **node.kwargs)
    return views[node]
