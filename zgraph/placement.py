"""Which temporaries of a step lie where, decided when the step is compiled: on a CPU in one arena.

    v14 = mm(v11, v12)                          v14 = mm_out(v11, v12, out=a0)     # bytes 64 to 1088
    v16 = cat([v14, v15])                ->     v15 = fill(0, out=a1)              # bytes 1088 to 2048
                                                v16 = a2                           # bytes 64 to 2048

Calls that can store their result where they are told to (``zgraph.into``) do, if it has ``SMALLEST_BYTES`` or more; a
flat gradient is made by its parts being stored in it. Where some come from a disk, all begin at a page. All else stays
with the C library, and so does what a step returns. A GPU's allocator keeps memory between steps, in blocks that it
knows; so there nothing is placed but the parts of flat gradients, each of which is allocated with the first of them.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import fx

from zgraph import ops
from zgraph.codegen.region import Region
from zgraph.into import ON_GPU, into
from zgraph.liveness import Held, Lifetime, held_bytes, lifetimes, owners
from zgraph.offsets import ALIGNMENT, assign_offsets
from zgraph.program import Program, operand
from zgraph.tiers import PAGE, padded

aten = torch.ops.aten

SMALLEST_BYTES = 2**16
"""Values below are a small part of memory and a large one of calls, and the C library keeps them at hand."""

ALIGNMENT_ON_GPU = 256
"""Of what is made in a part of a tensor, in bytes: cuBLAS may choose another kernel where there is less of it."""


@dataclass(frozen=True)
class Place:
    """Where a value lies.

    Attributes:
        start: its first byte in the arena, or in the room on a lower tier.
        shape, strides, dtype: of the tensor there; strides in elements. There are no gaps between its elements.
    """

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.start + self.num_bytes

    def like(self) -> torch.Tensor:
        """A tensor of its form without memory."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


ON_THEIR_WAY = 4
"""How many gradients the host has room for until its processors have read them."""


def spilled_places(program: Program) -> dict[fx.Node, Place]:
    """Where what a program spills lies in its rooms on lower tiers: one after the other, each from a page on.

    What is read there by one update alone may lie where another one was, whose update stands before: of
    ``ON_THEIR_WAY`` that follow each other, none does.
    """
    spills = program.graph.find_nodes(op="call_function", target=ops.spill)
    at = {node: index for index, node in enumerate(program.graph.nodes)}
    before: deque[tuple[fx.Node, int]] = deque(maxlen=ON_THEIR_WAY)  # spills, and the positions of their updates
    slot: dict[fx.Node, fx.Node] = {}  # the first that lies where each does
    for node in spills:
        readers = [user for wait in node.users for user in wait.users]
        if len(readers) != 1 or getattr(readers[0].target, "tier", None) is None:
            continue
        slot[node] = node
        if len(before) == ON_THEIR_WAY and before[0][1] < at[node]:
            slot[node] = slot[before[0][0]]
        before.append((node, at[readers[0]]))
    sizes: dict[fx.Node, int] = {}
    for node in spills:
        first = slot.get(node, node)
        sizes[first] = max(sizes.get(first, 0), padded(_place_of(node, 0).num_bytes))
    starts: dict[fx.Node, int] = {}
    for tier in set(map(ops.tier_of, sizes)):
        there = [node for node in sizes if ops.tier_of(node) == tier]
        starts |= zip(there, accumulate((sizes[node] for node in there), initial=0), strict=False)
    return {node: _place_of(node, starts[slot.get(node, node)]) for node in spills}


@dataclass(frozen=True)
class Placement:
    """The arena of one program; where there is none, its flat gradients, each of which has memory of its own.

    Attributes:
        places: of calls that store their result in it.
        copied: for each call in ``places`` that puts vectors one after another, of which some are made there: the
            places in it of the others, by their index.
        num_bytes: of the arena.
        least_bytes: the most that lies in it at once.
        inside: what lies in the arena, flat gradients from the first of their parts on.
        elsewhere: what the program holds besides, in order of allocation.
        copied_bytes: what a run of the program copies to put vectors one after another, zeros between them included.
        apart: the calls in ``copied`` that have memory of their own, one behind the other as places count, and the
            position in the graph before which each is allocated.
    """

    places: Mapping[fx.Node, Place]
    copied: Mapping[fx.Node, Mapping[int, Place]]
    num_bytes: int
    least_bytes: int
    inside: tuple[Lifetime, ...]
    elsewhere: tuple[Lifetime, ...]
    copied_bytes: int
    apart: Mapping[fx.Node, int] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The byte behind all places."""
        return max((self.places[node].stop for node in self.apart), default=self.num_bytes)


def place(program: Program, *, staged: bool = True, device_type: str | None = None) -> Placement:
    """Decide what lies where.

    Args:
        program: after all passes.
        staged: see ``zgraph.liveness.lifetimes``.
        device_type: where the program will run; where its parameters are if None.
    """
    found, captured_on = lifetimes(program, staged=staged), _device_type(program)
    device_type = captured_on if device_type is None else device_type
    if device_type not in ("cpu", "cuda"):
        return Placement({}, {}, 0, 0, (), tuple(found), copied_bytes(program, {}))
    alone = {node: life for node, life in _placeable(program, found).items() if _device(node) == captured_on}
    if device_type == "cuda":
        return _apart(program, _allocated_alike(program, alone), found)
    flats = _worthwhile(_flats(program, alone, ALIGNMENT), alone, found, len(program.graph.nodes))
    inside = {part for flat in flats for part in flat.parts}
    inside.update(flat.node for flat in flats)
    blocks: list[_Flat | Lifetime] = [
        *flats,
        *(life for node, life in alone.items() if node not in inside and _is_large(life)),
    ]
    is_loaded = any(block.node.target is ops.load for block in blocks)
    offsets = assign_offsets(blocks, PAGE if is_loaded else ALIGNMENT)
    places, copied = _places(blocks, offsets.starts)
    elsewhere = tuple(life for life in found if life.is_beside or life.node not in places)
    return Placement(
        places=places,
        copied=copied,
        num_bytes=offsets.num_bytes,
        least_bytes=offsets.least_bytes,
        inside=tuple(Lifetime(block.node, block.num_bytes, block.first, block.last) for block in blocks),
        elsewhere=elsewhere,
        copied_bytes=copied_bytes(program, copied),
    )


def _places(
    blocks: Sequence[_Flat | Lifetime], starts: Sequence[int]
) -> tuple[dict[fx.Node, Place], dict[fx.Node, dict[int, Place]]]:
    """Where results lie, and where vectors of flats are copied to, of blocks that begin at some bytes."""
    places: dict[fx.Node, Place] = {}
    copied: dict[fx.Node, dict[int, Place]] = {}
    for block, start in zip(blocks, starts, strict=True):
        places[block.node] = _place_of(block.node, start)
        if isinstance(block, _Flat):
            copied[block.node] = {}
            for index, (part, offset) in enumerate(zip(*block.vectors(), strict=True)):
                if index in block.made:
                    places[block.made[index]] = _place_of(block.made[index], start + offset)
                elif part.meta["val"].numel():
                    copied[block.node][index] = _place_of(part, start + offset)
    return places, copied


def _apart(program: Program, alone: Mapping[fx.Node, Lifetime], found: Sequence[Lifetime]) -> Placement:
    """Flat gradients alone, each in memory of its own from the first of its parts on."""
    flats = _worthwhile(_flats(program, alone, ALIGNMENT_ON_GPU), alone, found, len(program.graph.nodes))
    starts = list(accumulate((padded(flat.num_bytes) for flat in flats), initial=0))[:-1]
    places, copied = _places(flats, starts)
    together = [Lifetime(flat.node, flat.num_bytes, flat.first, flat.last) for flat in flats]
    others = (life for life in found if life.is_beside or life.node not in places)
    return Placement(
        places=places,
        copied=copied,
        num_bytes=0,
        least_bytes=0,
        inside=(),
        elsewhere=tuple(sorted([*together, *others], key=lambda life: life.first)),
        copied_bytes=copied_bytes(program, copied),
        apart={flat.node: flat.first for flat in flats},
    )


def _allocated_alike(program: Program, alone: Mapping[fx.Node, Lifetime]) -> dict[fx.Node, Lifetime]:
    """What a GPU may store in part of a tensor: not what is read by its place in memory of its own."""
    owner = owners(program)
    readers = [node for node in program.graph.nodes if node.target in ops.BY_PLACE]
    by_place = {owner[source] for node in readers for source in node.all_input_nodes}
    return {
        node: life
        for node, life in alone.items()
        if (node.target in ON_GPU or is_of_region(node)) and node not in by_place
    }


def copied_bytes(program: Program, copied: Mapping[fx.Node, Mapping[int, Place]]) -> int:
    """What a run of a program copies to put vectors one after another.

    Args:
        copied: see ``Placement``; what is not in it is copied as a whole.
    """
    total = 0
    for cat in program.graph.find_nodes(op="call_function", target=aten.cat.default):
        if cat in copied:
            total += sum(place.num_bytes for place in copied[cat].values())
        elif cat.meta["val"].dim() == 1:
            total += cat.meta["val"].nbytes
    return total


def _device_type(program: Program) -> str | None:
    """Where all parameters are; None if they are not on one kind of device."""
    if program.layout is None:
        return None
    found = {bucket.device.type for bucket in program.layout.buckets} or {"cpu"}
    return found.pop() if len(found) == 1 else None


def _is_large(life: Held) -> bool:
    return life.num_bytes >= SMALLEST_BYTES


def _place_of(node: fx.Node, start: int) -> Place:
    val = node.meta["val"]
    return Place(start, tuple(val.shape), tuple(val.stride()), val.dtype)


def _placeable(program: Program, found: Iterable[Lifetime]) -> dict[fx.Node, Lifetime]:
    """Calls that can be told where to store their result, whose memory the step does not return."""
    end = len(program.graph.nodes) - 1
    alone: dict[fx.Node, Lifetime] = {}
    for life in found:
        if life.num_bytes and not life.is_beside and life.last < end and _can_be_told(life.node):
            val = life.node.meta["val"]
            if val.numel() * val.itemsize == life.num_bytes:  # there are no gaps
                alone[life.node] = life
    return alone


def _can_be_told(node: fx.Node) -> bool:
    """Whether a call can be told where to store its result, or what unpacks it names a result of one that can."""
    return into(node) is not None or is_of_region(node)


def is_of_region(node: fx.Node) -> bool:
    """Whether a node unpacks a result of a region, which stores it where it is told to."""
    return node.target is operator.getitem and isinstance(operand(node).target, Region)


# Flat gradients


@dataclass(frozen=True)
class _Flat:
    """A concatenation of vectors, and those of them that can be made in it.

    Attributes:
        node: the concatenation.
        made: the calls that make vectors, by index.
        num_bytes, first, last: of its memory, from the first of its parts on.
    """

    node: fx.Node
    made: Mapping[int, fx.Node]
    num_bytes: int
    first: int
    last: int

    @property
    def parts(self) -> Iterable[fx.Node]:
        """The calls whose memory is its own."""
        return self.made.values()

    def vectors(self) -> tuple[list[fx.Node], list[int]]:
        """What is put together, and the byte at which each begins."""
        return _vectors(self.node)


def _vectors(cat: fx.Node) -> tuple[list[fx.Node], list[int]]:
    given: list[fx.Node] = list(cat.args[0])  # type: ignore[arg-type]
    offsets, end = [], 0
    for each in given:
        offsets.append(end)
        end += each.meta["val"].nbytes
    return given, offsets


def _device(node: fx.Node) -> str:
    device: torch.device = node.meta["val"].device
    return device.type


def _flats(program: Program, alone: Mapping[fx.Node, Lifetime], alignment: int) -> list[_Flat]:
    """Concatenations of vectors of one dtype, with all their parts that can be made in them."""
    owner = owners(program)
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    taken: set[fx.Node] = set()
    found = []
    for cat in program.graph.find_nodes(op="call_function", target=aten.cat.default):
        if cat not in alone or not _is_large(alone[cat]) or cat.meta["val"].dim() != 1:
            continue
        if {vector.meta["val"].dtype for vector in cat.args[0]} != {cat.meta["val"].dtype}:
            continue
        made: dict[int, fx.Node] = {}
        for index, (vector, offset) in enumerate(zip(*_vectors(cat), strict=True)):
            part = owner[vector]
            if part not in alone or part in taken or offset % alignment or part.target is aten.cat.default:
                continue
            if part.target not in ops.STARTS and _is_whole(vector, part) and alone[part].last <= position[cat]:
                made[index] = part
                taken.add(part)
        if made:
            first = min(alone[part].first for part in made.values())
            found.append(_Flat(cat, made, alone[cat].num_bytes, first, alone[cat].last))
    return found


def _is_whole(vector: fx.Node, part: fx.Node) -> bool:
    """Whether a vector is all elements of a call's result in the order in which they lie in memory."""
    val, whole = vector.meta["val"], part.meta["val"]
    is_same = val.dtype == whole.dtype and val.numel() == whole.numel()
    return bool(is_same and val.is_contiguous() and val.storage_offset() == whole.storage_offset() == 0)


def _worthwhile(
    flats: Sequence[_Flat], alone: Mapping[fx.Node, Lifetime], found: Sequence[Lifetime], num_positions: int
) -> list[_Flat]:
    """Those flats whose memory may be there from their first part on without more being held at the peak.

    One that is made by copying is there from the concatenation on, but until then so are all its parts beside it.
    Where more is held, flats are given up one after another: that first which holds most that is not written yet.
    """
    bound = max(held_bytes(found, num_positions))
    kept = list(flats)
    while kept:
        inside = {part for flat in kept for part in (*flat.parts, flat.node)}
        held: list[Held] = [*kept, *(life for life in found if life.is_beside or life.node not in inside)]
        alive = held_bytes(held, num_positions)
        peak = max(alive)
        if peak <= bound:
            break
        at = alive.index(peak)
        here = [flat for flat in kept if flat.first <= at <= flat.last]
        worst = max(here, key=lambda flat: flat.num_bytes - _used(flat, alone, at))
        kept = [flat for flat in kept if flat is not worst]
    return kept


def _used(flat: _Flat, alone: Mapping[fx.Node, Lifetime], position: int) -> int:
    """What a flat and its parts would hold at a position, had each memory of its own."""
    apart = [alone[flat.node], *(alone[part] for part in flat.parts)]
    return sum(life.num_bytes for life in apart if life.first <= position <= life.last)
