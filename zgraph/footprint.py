"""Which bytes a step holds, of what kind, from when to when.

State, batch and constants are held throughout, but for what lies on a lower tier; temporaries from the call that makes
them to the last one that reads them (``zgraph.liveness``). What is alive at the peak, and what it is for, answers why a
step does not fit.
"""

from __future__ import annotations

import enum
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from zgraph import ops, scratch
from zgraph.codegen.region import Region
from zgraph.fusion import Fusion
from zgraph.hardware import Hardware
from zgraph.liveness import held_bytes, lifetimes
from zgraph.ops import root_of
from zgraph.placement import Placement, place, spilled_places
from zgraph.program import FlatGradient, Input, Origin, Phase, Program, Role, operand, phase_of, target_name


class Kind(enum.Enum):
    """What bytes are for.

    ACTIVATIONS are computed in forward and held beyond it, or spilled and loaded again. COMMUNICATION is what is sent
    and is none of the kinds before, and what other ranks sent before it is added up. UNUSED is what an arena
    (``zgraph.placement``) has beyond what lies in it.
    """

    PARAMS = "parameter shards"
    GATHERED = "gathered parameters"
    GRADIENTS = "gradients"
    STATE = "optimizer state"
    BUFFERS = "buffers and batch"
    ACTIVATIONS = "activations"
    COMMUNICATION = "communication buffers"
    TEMPORARIES = "temporaries"
    SCRATCH = "scratch of libraries"
    UNUSED = "arena, not in use"


_OF_ROLE = {
    Role.PARAM: Kind.PARAMS,
    Role.OPT_STATE: Kind.STATE,
    Role.GRADIENT: Kind.GRADIENTS,
    Role.GATHERED: Kind.GATHERED,
}


@dataclass(frozen=True)
class Holding:
    """Bytes that are held together.

    Attributes:
        what: an input's meaning, or the operator that made them.
        kind: what they are for.
        num_bytes: how many.
        first, last: positions in the graph of the first and last call during which they are held.
        module: the user's module that they belong to; empty if to none.
        source: the user's line that made them; None where not known.
        in_arena: whether they lie in the arena.
    """

    what: str
    kind: Kind
    num_bytes: int
    first: int
    last: int
    module: str = ""
    source: str | None = None
    in_arena: bool = False


@dataclass(frozen=True)
class Footprint:
    """All bytes of a step.

    Attributes:
        holdings: in order of their first position.
        num_positions: nodes of the graph.
        arena_bytes: what a model's arena holds throughout, whatever lies in it.
        away: what lies on lower tiers instead, by tier, which counts nowhere else.
    """

    holdings: tuple[Holding, ...]
    num_positions: int
    arena_bytes: int = 0
    away: Mapping[str, tuple[Holding, ...]] = field(default_factory=dict)

    @cached_property
    def alive_bytes(self) -> Sequence[int]:
        """Bytes held while each node of the graph runs."""
        return held_bytes(self.holdings, self.num_positions)

    def by_kind(self, tier: str | None = None) -> dict[Kind, Sequence[int]]:
        """Bytes of each kind held in memory, or on a lower tier, while each node of the graph runs."""
        holdings = self.holdings if tier is None else self.away.get(tier, ())
        return {kind: held_bytes((h for h in holdings if h.kind is kind), self.num_positions) for kind in Kind}

    @cached_property
    def _outside_bytes(self) -> Sequence[int]:
        return held_bytes((h for h in self.holdings if not h.in_arena), self.num_positions)

    def away_bytes(self, tier: str) -> int:
        """The most that lies on a lower tier at once, with the room of all that a step spills there."""
        return sum(holding.num_bytes for holding in self.away.get(tier, ()))

    @cached_property
    def peak_bytes(self) -> int:
        """The most that is held at once, the whole arena included."""
        return max(self._outside_bytes) + self.arena_bytes

    @cached_property
    def peak_position(self) -> int:
        """Where in the graph the most is held, and of such places the first where most of the arena is in use."""
        held = list(zip(self._outside_bytes, self.alive_bytes, strict=True))
        return held.index(max(held))

    def held_at(self, position: int) -> list[Holding]:
        """What is held while a node runs, largest first."""
        held = [h for h in self.holdings if h.first <= position <= h.last and h.num_bytes]
        return sorted(held, key=lambda holding: (-holding.num_bytes, holding.first))

    @property
    def peak_holdings(self) -> list[Holding]:
        """What is held at the peak, largest first."""
        return self.held_at(self.peak_position)

    def peak_by_kind(self) -> Counter[Kind]:
        """Bytes of each kind at the peak."""
        found: Counter[Kind] = Counter()
        for holding in self.peak_holdings:
            found[holding.kind] += holding.num_bytes
        if self.arena_bytes:
            found[Kind.UNUSED] = self.peak_bytes - found.total()
        return found


def footprint(
    program: Program, *, staged: bool = True, fusion: Fusion | None = None, placement: Placement | None = None
) -> Footprint:
    """What a program holds.

    Args:
        program: at any stage.
        staged: see ``zgraph.liveness.lifetimes``.
        fusion: which calls are one kernel, so that what lies between them is not held; none if None.
        placement: what lies in an arena; nothing does if None.
    """
    nodes = list(program.graph.nodes)
    found = []
    for node, what in program.placeholders():
        val = node.meta["val"]
        if isinstance(val, torch.Tensor) and program.tier_of(node) is None:
            kind = _OF_ROLE.get(what.role, Kind.BUFFERS)
            found.append(Holding(str(what), kind, val.nbytes, 0, len(nodes) - 1))
    if placement is None:
        lives = [(life, False) for life in lifetimes(program, staged=staged, also_reads=fusion.reads if fusion else {})]
    else:
        lives = [*((life, True) for life in placement.inside), *((life, False) for life in placement.elsewhere)]
    for life, in_arena in sorted(lives, key=lambda item: item[0].first):
        if fusion is not None and life.node in fusion.internal:
            continue
        origin = life.node.meta["origin"]
        if life.num_bytes:
            is_received = life.is_beside and life.node.target in ops.STARTS
            kind = Kind.COMMUNICATION if is_received else _kind(life.node, nodes[life.last])
            name = _maker(life.node)
            at = (life.first, life.last, origin.module, origin.source)
            found.append(Holding(name, kind, life.num_bytes, *at, in_arena))
    arena_bytes = placement.num_bytes if placement is not None else 0
    away: dict[str, list[Holding]] = {}
    for tier, holding in _away(program):
        away.setdefault(tier, []).append(holding)
    by_tier = {tier: tuple(there) for tier, there in away.items()}
    return Footprint(tuple(found), len(nodes), arena_bytes, by_tier)


def _away(program: Program) -> Iterator[tuple[str, Holding]]:
    """State on a lower tier, from when it is there on, and what a step spills, until it has been loaded."""
    at = {node: position for position, node in enumerate(program.graph.nodes)}
    for what, (tier, node) in _stored(program).items():
        first = 0 if node.op == "placeholder" else at[node]
        yield tier, Holding(str(what), _OF_ROLE[what.role], node.meta["val"].nbytes, first, len(at) - 1)
    for nodes in _spilled_together(program):
        reads = [at[end] for each in nodes for wait in each.users for load in wait.users for end in (load, *load.users)]
        node = max(nodes, key=lambda each: each.meta["val"].nbytes)
        made, num_bytes = operand(node), node.meta["val"].nbytes
        origin: Origin = made.meta["origin"]
        since = min(map(at.__getitem__, nodes))
        kept = Holding(_maker(made), spilled_kind(node), num_bytes, since, max(reads), origin.module, origin.source)
        yield ops.tier_of(node), kept


def _spilled_together(program: Program) -> Iterable[list[fx.Node]]:
    """What is spilled, by its place."""
    found: dict[tuple[str, int], list[fx.Node]] = {}
    for node, there in spilled_places(program).items():
        found.setdefault((ops.tier_of(node), there.start), []).append(node)
    return found.values()


def state_on(tier: str, program: Program) -> dict[Input, int]:
    """Bytes of one rank's parameters and what is theirs that lie on a tier, or will once the program has made them."""
    return {what: node.meta["val"].nbytes for what, (where, node) in _stored(program).items() if where == tier}


def _stored(program: Program) -> dict[Input, tuple[str, fx.Node]]:
    """Inputs that lie on lower tiers, and results that will, each with its tier."""
    found = {what: (tier, node) for node, what in program.placeholders() if (tier := program.tier_of(node)) is not None}
    for what, result in zip(program.outputs, program.results(), strict=True):
        if what is None or what in found or not isinstance(result, fx.Node):
            continue
        tier = program.kept_on(what, result.meta["val"])
        if tier is not None:
            found[what] = (tier, result)
    return found


def spilled_bytes(program: Program, tier: str | None = None) -> int:
    """Bytes that a run of a program keeps for a while on a lower tier; on all of them if None."""
    return sum(
        max(node.meta["val"].nbytes for node in nodes)
        for nodes in _spilled_together(program)
        if tier in (None, ops.tier_of(nodes[0]))
    )


def spilled_kind(spill: fx.Node) -> Kind:
    """What is spilled: what forward has made, or gradients and what goes with them."""
    return Kind.ACTIVATIONS if phase_of(operand(spill)) is Phase.FORWARD else Kind.GRADIENTS


def with_state(found: Footprint, last: Footprint) -> Footprint:
    """And the optimizer state of the last micro-batch's program, which is there though those before do not read it."""
    names = {holding.what for holdings in (found.holdings, *found.away.values()) for holding in holdings}

    def unread(holdings: Sequence[Holding]) -> Iterator[Holding]:
        for each in holdings:
            is_kept = each.kind is Kind.STATE and (each.first, each.last) == (0, last.num_positions - 1)
            if is_kept and each.what not in names:
                yield replace(each, last=found.num_positions - 1)

    holdings = (*unread(last.holdings), *found.holdings)
    away = {tier: (*found.away.get(tier, ()), *unread(there)) for tier, there in last.away.items()}
    return replace(found, holdings=holdings, away={**found.away, **away})


def with_scratch(found: Footprint, program: Program) -> Footprint:
    """And what libraries hold on a CPU, where it lies in the memory that tensors lie in.

    Args:
        found: of the program.
        program: whose products are looked at.
    """
    num_bytes = min(max(map(scratch.packed_bytes, program.graph.nodes), default=0), scratch.PACKED_BYTES)
    packed = Holding("matrix products", Kind.SCRATCH, num_bytes, 0, found.num_positions - 1)
    return replace(found, holdings=(packed, *_worked_in(program), *found.holdings))


def _worked_in(program: Program) -> Iterator[Holding]:
    """What each call works in, while it runs."""
    for position, node in enumerate(program.graph.nodes):
        if num_bytes := scratch.work_bytes(node):
            origin: Origin = node.meta["origin"]
            yield Holding(_maker(node), Kind.SCRATCH, num_bytes, position, position, origin.module, origin.source)


def _maker(node: fx.Node) -> str:
    """The operator that made a value, where it may be one of several results."""
    target: Any = operand(node).target if node.target is operator.getitem else node.target
    if isinstance(target, torch._ops.OpOverload):
        return target_name(target)
    return target.name if isinstance(target, Region) else "update"


def _kind(node: fx.Node, last: fx.Node) -> Kind:
    if node.target in (ops.all_gather, ops.all_gather_into):
        return Kind.GATHERED
    if node.target is ops.load:
        what = operand(node).meta.get("input")
        return spilled_kind(operand(operand(node))) if what is None else _OF_ROLE[what.role]
    if node.target is ops.dequantize or _is_widened(node):
        return Kind.GATHERED
    if node.target is ops.all_to_all:
        return Kind.COMMUNICATION
    if node.target is ops.reduce_scatter or _is_gradient(node):
        return Kind.GRADIENTS
    phase: Phase = node.meta["origin"].phase
    last_phase = last.meta["origin"].phase if last.op == "call_function" else Phase.UPDATE
    spill = next((user for user in node.users if user.target is ops.spill), None)
    if spill is not None:
        return spilled_kind(spill)
    if phase is Phase.FORWARD and last_phase is not Phase.FORWARD:
        return Kind.ACTIVATIONS
    if any(user.target in ops.STARTS for user in node.users):
        return Kind.COMMUNICATION
    return Kind.TEMPORARIES


def _is_widened(node: fx.Node) -> bool:
    """Whether a value is a whole bucket of parameters in another dtype than it was gathered in."""
    if node.target is not torch.ops.aten._to_copy.default:
        return False
    source = operand(node)
    return source.target is ops.wait and operand(source).target is ops.all_gather


def _is_gradient(node: fx.Node) -> bool:
    """Whether a value is a bucket's flat gradient, or the sum of those of all ranks, or goes into one."""
    if isinstance(node.meta.get("holds"), FlatGradient):
        return True
    if node.target is ops.all_reduce:
        sent = operand(node)
        rounded = operand(sent) if sent.target is torch.ops.aten._to_copy.default else sent
        return any(isinstance(each.meta.get("holds"), FlatGradient) for each in (sent, root_of(rounded)))
    if node.meta["origin"].phase is not Phase.BACKWARD:
        return False
    reached, seen = [node], {node}
    while reached:
        for user in reached.pop().users:
            if isinstance(user.meta.get("holds"), FlatGradient):
                return True
            if user not in seen and ops.view_of(user) is not None and root_of(user) is node:
                seen.add(user)
                reached.append(user)
    return False


def placed(program: Program, hardware: Hardware) -> Placement:
    """What lies where on a machine."""
    return place(program, staged=hardware.is_staged, device_type=hardware.device_type)


def held_by(program: Program, hardware: Hardware, placement: Placement | None = None) -> Footprint:
    """What a program holds on a machine: on a CPU with an arena of its own, and with what libraries hold.

    Args:
        program: at any stage.
        hardware: the machine.
        placement: what ``placed`` gives, which is worked out if None.
    """
    placement = placed(program, hardware) if placement is None else placement
    held = footprint(program, staged=hardware.is_staged, placement=placement)
    return with_scratch(held, program) if hardware.device_type == "cpu" else held
