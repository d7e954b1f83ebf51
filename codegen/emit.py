"""Emit a program as one readable Python function.

Each value is dropped right after its last use, and the argument list is emptied on entry, so that a buffer is free as
soon as the program is done with it. What has a place in an arena, or in a flat gradient that has memory of its own, is
stored there. Collectives go through a ``comm`` object, transfers through what lies on a lower tier
(``zgraph.tiers.Stored``), which for what is spilled there comes with the call; everything else is a plain call.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Protocol

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen import comments
from zgraph.codegen.owned import OwnedUpdate
from zgraph.codegen.quantizers import IN_ONE_PASS
from zgraph.codegen.region import Region
from zgraph.codegen.source import SourceWriter
from zgraph.into import into
from zgraph.liveness import last_uses
from zgraph.placement import Place, Placement, copied_bytes, is_of_region, spilled_places
from zgraph.program import Mesh, Program, describe, operand
from zgraph.tiers import padded

aten = torch.ops.aten

LINE = 112
"""Columns of a list of names in generated source."""

_COMM_METHODS: dict[Any, str] = {
    ops.all_gather: "all_gather",
    ops.all_gather_into: "all_gather",
    ops.share: "share",
    ops.reduce_scatter: "reduce_scatter",
    ops.all_reduce: "all_reduce",
    ops.all_to_all: "all_to_all",
    ops.wait: "wait",
    ops.shard: "shard",
}


class Watch(Protocol):
    """Looks on while an emitted function runs.

    Attributes:
        begin: is called with the inputs of a step.
        see: is called after each call with its number in the graph and, where ``needs_values``, with all that the
            function holds then, by name.
    """

    needs_values: bool

    @property
    def begin(self) -> Callable[[Sequence[Any]], None]: ...
    @property
    def see(self) -> Callable[..., None]: ...


@dataclass(frozen=True, eq=False)
class Step:
    """An emitted program.

    Attributes:
        source: what is run.
        function: ``step(inputs, comm) -> results``; where there are places, ``step(inputs, comm, arena) -> results``,
            and where something is spilled, ``room`` comes behind these.
        places: what ``arena`` has a tensor for each.
        copied_bytes: see ``zgraph.placement.Placement``.
        spilled: what ``room`` has a ``Stored`` for each: the tier that it lies on, and where in the room there.
    """

    source: str
    function: Callable[..., list[Any]]
    places: tuple[Place, ...]
    copied_bytes: int
    spilled: tuple[tuple[str, Place], ...] = ()

    @property
    def spilled_bytes(self) -> dict[str, int]:
        """Of the rooms on lower tiers."""
        found: dict[str, int] = {}
        for tier, place in self.spilled:
            found[tier] = max(found.get(tier, 0), place.start + padded(place.num_bytes))
        return found


def emit(
    program: Program,
    placement: Placement | None = None,
    *,
    tagged: bool = False,
    watch: Watch | None = None,
    in_one_pass: bool = True,
) -> Step:
    """Write and compile ``program``.

    Args:
        placement: where results are stored; all are allocated if None.
        tagged: each collective says which one it is, for ``zgraph.agreement.CheckedComm``.
        watch: who looks on; nobody if None.
        in_one_pass: vectors are quantised and packed by ``zgraph.codegen.quantizers``; by ATen's calls if not.
    """
    writer = SourceWriter()
    names: dict[fx.Node, str] = {node: f"v{i}" for i, node in enumerate(program.graph.nodes)}
    dying = last_uses(program.graph)
    arena = _Arena(placement)
    spilled = spilled_places(program)
    slots = {node: f"d{i}" for i, node in enumerate(spilled)}
    lines = [f"def step(inputs, comm{', arena' if arena.given else ''}{', room' if slots else ''}):"]
    lines += [f"    {line}" for line in comments.header(program, names)]
    lines += _unpack([names[node] for node, _ in program.placeholders()], "inputs")
    watched = writer.bind(watch, "watch") if watch is not None else None
    if watched is not None:
        lines.append(f"    {watched}.begin(inputs)")
    lines.append("    inputs.clear()")
    lines += _unpack([arena.names[place] for place in arena.given], "arena") if arena.given else []
    lines += _unpack(list(slots.values()), "room") if slots else []
    groups = comments.Groups()
    for number, node in enumerate(program.graph.nodes):
        if node.op == "output":
            lines.append(f"    return {writer.argument(node.args[0], names)}")
        if node.op != "call_function":
            continue
        lines += [f"    {line}".rstrip() for line in groups.before(node)]
        lines += [f"    {line}" for line in arena.allocated(number, writer)]
        tag = _tag(node, names[node]) if tagged and node.target in ops.STARTS else None
        lines += [f"    {line}" for line in _copies(writer, node, names, arena)]
        if node in slots:
            call = f"{slots[node]}.store({names[operand(node)]})"
        else:
            call = _expression(writer, node, names, tag, arena, program.mesh, IN_ONE_PASS if in_one_pass else {})
        lines.append(f"    {names[node]} = {call}{comments.mark(node)}")
        if watched is not None:
            assert watch is not None
            lines.append(f"    {watched}.see({number}{', locals()' if watch.needs_values else ''})")
        dead = [names[n] for n in dying.get(node, ())] + arena.done_with(node)
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    lines += arena.legend()
    if slots:
        lines.append("    # Places in rooms on lower tiers:")
    for node, name in slots.items():
        form = describe(spilled[node].like())
        lines.append(f"    #   {name}: {form} from byte {spilled[node].start} on, {ops.tier_of(node)}")
    source = "\n".join(lines) + "\n"
    function = writer.compile(source, "step", f"<zgraph step {id(program):x}>")
    copied = copied_bytes(program, {}) if placement is None else placement.copied_bytes
    return Step(
        source, function, arena.given, copied, tuple((ops.tier_of(node), there) for node, there in spilled.items())
    )


def _copies(writer: SourceWriter, node: fx.Node, names: Mapping[fx.Node, str], arena: _Arena) -> Iterator[str]:
    """What copies vectors to where they belong; one call copies many of them, in one launch on a GPU."""
    vectors: Any = node.args[0]
    pairs = [(arena.names[place], names[vectors[index]]) for index, place in arena.copied(node).items()]
    if len(pairs) > 1:
        targets, sources = (f"[{', '.join(each)}]" for each in zip(*pairs, strict=True))
        yield writer.expression(aten._foreach_copy_.default, [targets, sources])
    elif pairs:
        yield writer.expression(aten.copy_.default, list(pairs[0]))


def _unpack(names: Sequence[str], given: str) -> list[str]:
    """Lines that give a name to each of what a list holds."""
    lines = wrap(", ".join(names), LINE)
    return (
        [f"    [{lines[0]}] = {given}"]
        if len(lines) == 1
        else ["    [", *(f"        {e}" for e in lines), f"    ] = {given}"]
    )


class _Arena:
    """What the places of a program are called; those that are alike have one name."""

    def __init__(self, placement: Placement | None) -> None:
        self.placement = placement
        self.names: dict[Place, str] = {}
        if placement is not None:
            for place in (
                *placement.places.values(),
                *(p for each in placement.copied.values() for p in each.values()),
            ):
                self.names.setdefault(place, f"a{len(self.names)}")
        self._apart = {} if placement is None else placement.apart
        self._parts: dict[fx.Node, list[Place]] = {flat: [] for flat in self._apart}  # behind the whole
        self._begin: dict[int, list[fx.Node]] = {}
        for flat, first in self._apart.items():
            self._begin.setdefault(first, []).append(flat)
        if placement is not None and self._apart:
            flats, starts = [*self._apart], [placement.places[flat].start for flat in self._apart]
            for place in self.names:
                self._parts[flats[bisect_right(starts, place.start) - 1]].append(place)

    @property
    def given(self) -> tuple[Place, ...]:
        """Those that the step is given; it allocates what lies apart itself."""
        return () if self._apart else tuple(self.names)

    def allocated(self, number: int, writer: SourceWriter) -> Iterator[str]:
        """Lines that allocate what lies apart and begins to be needed by the call at a position."""
        for flat in self._begin.get(number, ()):
            whole, *parts = self._parts[flat]
            form = [*map(writer.literal, (whole.shape, whole.strides))]
            kind = [f"dtype={whole.dtype}", f"device={writer.literal(flat.meta['val'].device)}"]
            yield f"{self.names[whole]} = {writer.expression(aten.empty_strided.default, [*form, *kind])}"
            for part in parts:
                offset = (part.start - whole.start) // whole.dtype.itemsize
                given = [self.names[whole], *map(writer.literal, (part.shape, part.strides, offset))]
                yield f"{self.names[part]} = {writer.expression(aten.as_strided.default, given)}"

    def done_with(self, node: fx.Node) -> list[str]:
        """Names that are needed no more: of what lies apart, once it has been put together."""
        return [self.names[place] for place in self._parts.get(node, ())]

    def legend(self) -> Iterator[str]:
        """What the places are, behind the step: there are about as many as calls that compute."""
        if self.given:
            yield "    # Places in the arena:"
        for place in self.given:
            yield f"    #   {self.names[place]}: {describe(place.like())} in bytes {place.start} to {place.stop}"

    def name(self, node: fx.Node) -> str | None:
        """That of a call's place; None if it has none."""
        place = None if self.placement is None else self.placement.places.get(node)
        return None if place is None else self.names[place]

    def copied(self, node: fx.Node) -> Mapping[int, Place]:
        return {} if self.placement is None else self.placement.copied.get(node, {})

    def is_made_of_parts(self, node: fx.Node) -> bool:
        return self.placement is not None and node in self.placement.copied


def _tag(node: fx.Node, name: str) -> str:
    """A collective's name, operation, and value; the same on all ranks that run the same program."""
    what = f"{name} = {_COMM_METHODS[node.target]} of {describe(operand(node).meta['val'])}"
    return f"{what} ({node.meta['origin'].source or 'no line of the model'})"


def _comm(mesh: Mesh, axis: str) -> str:
    """What collectives along an axis go through."""
    return "comm" if axis == mesh.axis else f"comm.axes[{axis!r}]"


def _expression(
    writer: SourceWriter,
    node: fx.Node,
    names: dict[fx.Node, str],
    tag: str | None,
    arena: _Arena,
    mesh: Mesh,
    instead: Mapping[Any, Callable[..., Any]],
) -> str:
    place = arena.name(node)
    if place is not None and arena.is_made_of_parts(node):
        return place
    if node.target is ops.load:
        return f"{names[operand(node)]}.load({f'out={place}' if place is not None else ''})"
    if node.target is ops.store:
        return f"{names[node.kwargs['out']]}.store({names[operand(node)]})"  # type: ignore[index]
    if node.target is ops.wait and operand(node).target in ops.TRANSFERS:
        return f"{names[operand(node)]}.wait()"
    method = _COMM_METHODS.get(node.target)
    if method is not None:
        # The mesh gives the size; what is passed is the tensor, the reduction, and where to put the result.
        args = [writer.argument(a, names) for a in node.args[: 2 if "reduce" in method else 1]]
        args += [f"{key}={writer.argument(value, names)}" for key, value in node.kwargs.items()]
        if place is not None:
            args.append(f"out={place}")
        if tag is not None:
            args.append(f"tag={writer.literal(tag)}")
        return f"{_comm(mesh, ops.axis_of(node))}.{method}({', '.join(args)})"
    if isinstance(node.target, Region):
        by_index = {user.args[1]: arena.name(user) for user in node.users}
        outs = [by_index.get(index) for index in range(len(node.target.writes))]
        told = [f"outs=[{', '.join(out or 'None' for out in outs)}]"] if any(outs) else []
        return writer.expression(node.target, [*(writer.argument(arg, names) for arg in node.args), *told])
    if place is not None and not is_of_region(node):
        call = into(node)
        assert call is not None, node
        args = [writer.argument(a, names) for a in call.args]
        args += [f"{key}={writer.argument(value, names)}" for key, value in call.kwargs.items()]
        return writer.expression(call.target, [*args, f"{call.out}={place}"])
    if isinstance(node.target, OwnedUpdate):
        vals = tuple(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args)
        whose = [f"rank={_comm(mesh, mesh.shard_axis)}.rank"] if node.target.is_divided(vals) else []
        return writer.expression(node.target, [*(writer.argument(arg, names) for arg in node.args), *whose])
    return writer.call(node, names, instead.get(node.target))
