"""Keep gradients on a lower tier until their norm is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import fx

from zgraph import ops
from zgraph.liveness import Lifetime, lifetimes
from zgraph.passes.trips import Idle, Trip, done_at, families, last_value, make, readers_of
from zgraph.program import Program
from zgraph.skipping import GRADIENT_NORM

IN_MEMORY = 3
"""How many gradients are in memory at once while backward makes them: one that is made, and those that go."""


def offload_gradients(program: Program, tier: str) -> None:
    """Spill each gradient behind its part of the norm, and load it before its update.

        g = wait(reduce_scatter(..))       g = wait(reduce_scatter(..))
        s = square_sum(g)                  s = square_sum(g)
        ...                                t = spill(g)
        n = sqrt(add_up([s, ...]))         ...
        p' = update(p, g, clip(n))    ->   wait(t)                       # before the third gradient from here is made
                                           ...
                                           n = sqrt(add_up([s, ...]))
                                           u = load(t)                   # while the bucket before is updated
                                           p' = update(p, wait(u), clip(n))

    The first stays: its update begins as soon as the norm is known, and the second comes meanwhile. What goes to the
    host in any case, to be updated with there (``zgraph.passes.host_updates``), goes behind its part of the norm, too.

    Args:
        program: after its last lowering. Unless the norm of all gradients is among its results, nothing waits for it.
        tier: where they go.
    """
    if GRADIENT_NORM not in program.outputs:
        return
    nodes = list(program.graph.nodes)
    norm = nodes.index(program.results()[program.outputs.index(GRADIENT_NORM)])
    waiting = _Waiting(program, nodes, norm)
    by_use = sorted(waiting.begins, key=lambda idle: idle.again)
    if len(by_use) <= IN_MEMORY + 1:
        if by_use:
            program.notes += (f"{len(by_use)} gradients wait for their norm in memory, as so few are there at once",)
        return
    load_at = dict(zip(by_use[1:], [norm, *(idle.again for idle in by_use[1:])], strict=False))
    trips = []
    for idle, begin in zip_longest(waiting.begins, list(waiting.begins.values())[IN_MEMORY:]):
        if (spill := waiting.to_be_used_there(idle)) is not None:
            nodes[idle.read + 1].prepend(spill)
            nodes[norm if begin is None else max(begin, idle.read + 1)].prepend(*spill.users)
        elif idle in load_at:
            stored_at = by_use[1].again if begin is None else max(begin, idle.read + 1)
            if stored_at < idle.again:
                trips.append(Trip(idle, stored_at, max(stored_at, load_at[idle])))
    make(program, trips, tier)


class _Waiting:
    """Gradients that are read for their norm, and again when it is known.

    Attributes:
        begins: the position from which on each has memory, in the order in which their parts of the norm are known.
    """

    def __init__(self, program: Program, nodes: list[fx.Node], norm: int) -> None:
        self._program, self._nodes, self._norm = program, nodes, norm
        self._place = {node: i for i, node in enumerate(nodes)}
        self.begins = dict(sorted(self._find(), key=lambda each: each[0].read))

    def to_be_used_there(self, idle: Idle) -> fx.Node | None:
        """The call by which it goes to where an update is made, if that is all it is needed for."""
        late = self._late([self._nodes[at] for at in idle.family])
        return late[0] if len(late) == 1 and late[0].target is ops.spill else None

    def _find(self) -> Iterator[tuple[Idle, int]]:
        together = families(self._program)
        for life in lifetimes(self._program):
            if life.is_beside or not life.first < self._norm < life.last:
                continue
            early = [node for node in together[life.node] if self._place[node] < self._norm]
            if not early:
                continue
            family = last_value(early)
            readers, late = readers_of(family), self._late(family)
            is_read = any(reader.target is ops.square_sum for reader in readers)
            if late and is_read and _can_go(life, family) and self._program.output_node not in readers:
                read = max(done_at(reader, self._place) for reader in readers if self._place[reader] < self._norm)
                at = tuple(self._place[node] for node in family)
                yield Idle(at, read, min(self._place[reader] for reader in late), life.num_bytes), life.first

    def _late(self, family: Sequence[fx.Node]) -> list[fx.Node]:
        """Those of its readers that wait for the norm."""
        return [reader for reader in readers_of(family) if self._place[reader] > self._norm]


def _can_go(life: Lifetime, family: Sequence[fx.Node]) -> bool:
    """Whether memory holds one tensor without gaps."""
    kept, *views = family
    val = kept.meta["val"]
    if not isinstance(val, torch.Tensor) or val.layout is not torch.strided or val.nbytes != life.num_bytes:
        return False
    return val.numel() > 0 and all(len(node.all_input_nodes) == 1 for node in views)
