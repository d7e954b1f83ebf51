"""Compute in another order, where that lowers the peak: memory first, for a budget that is not met otherwise.

Programs compute in the order in which the model and autograd did. Nothing but what depends on what asks for it: where
a value is made long before it is read, or could be read earlier and be gone, the peak may lie lower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import fx

from zgraph import ops
from zgraph.hardware import Hardware
from zgraph.liveness import Lifetime, lifetimes
from zgraph.passes.order import arrange
from zgraph.passes.schedule import Holding
from zgraph.pipeline import Pass
from zgraph.program import Phase, Program, Stage, phase_of

_NUM_LARGEST = 12
"""Of what is held at the peak, how many values are looked at."""

_SHARPNESS = 16
_GAIN = 1e-9
_MOST_WORK = 400_000
"""Calls of all the orders that are tried together, so that a long step does not take much longer than a short one."""


@dataclass(frozen=True)
class OrderByMemory(Pass):
    """Make values that are held at the peak behind it, or read them before it, as long as the peak falls.

        a = mm(x, u)                 b = mm(x, v)
        b = mm(x, v)        ->       c = sum(b)         # b is free from here
        c = sum(b)                   a = mm(x, u)
        d = sum(a)                   d = sum(a)

    From one order to the next a value moves with what is made for it alone, or what reads it moves with what that needs
    and what follows from it; what is sent is respected, random numbers are drawn in the order they were, and values of
    forward are made before backward. An order is taken if its peak is no higher, and what is held near it is less. So
    the peak never rises, and the same program always gets the same order. It comes behind the scheduler, whose order of
    what travels it may change: memory comes first here, and the timeline says what that costs.

    Args:
        hardware: the machine, as each rank finds it: whether its collectives need memory of their own.
    """

    hardware: Hardware | None = field(default=None, repr=False)

    takes = gives = Stage.SCHEDULED

    def rewrite(self, program: Program) -> None:
        assert program.layout is not None
        on_cpu = program.layout.buckets[0].device.type == "cpu"
        _Descent(program, staged=on_cpu if self.hardware is None else self.hardware.is_staged).run()


class _Descent:
    """Tries moves at the peak, and takes each that helps, until none does."""

    def __init__(self, program: Program, *, staged: bool) -> None:
        self.program, self.staged = program, staged
        self.holding = Holding(program, staged=staged)
        self.owner = self.holding.owner
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)  # of memory; views of it do not count
        for node in program.graph.nodes:
            for source in node.all_input_nodes:
                if node.op == "call_function" and self.owner[node] is not self.owner[source]:
                    self.readers[self.owner[source]].append(node)

    def run(self) -> None:
        best, height = self._order(), self._height()
        num_left = max(_MOST_WORK // max(len(best), 1), _NUM_LARGEST)
        is_lower = True
        while is_lower and num_left > 0:
            is_lower = False
            for wishes in list(self._moves(best))[:num_left]:
                self._put(best, wishes)
                found = self._height()
                num_left -= 1
                if found[0] <= height[0] and found[1] < height[1] * (1 - _GAIN):
                    best, height, is_lower = self._order(), found, True
                    break
            self._put(best, {})

    def _order(self) -> list[fx.Node]:
        return [node for node in self.program.graph.nodes if node.op == "call_function"]

    def _put(self, order: list[fx.Node], wishes: dict[fx.Node, tuple[int, ...]]) -> None:
        arrange(self.program, {node: (i, 0) for i, node in enumerate(order)} | wishes)

    def _height(self) -> tuple[int, float]:
        """The peak, and a norm of all that is held that sees what lies a little below it, too."""
        held: NDArray[np.float64] = np.array(self.holding.now(), dtype=np.float64)
        peak = float(held.max())
        if not peak:
            return 0, 0.0
        return int(peak), peak * float(np.sum((held / peak) ** _SHARPNESS) ** (1 / _SHARPNESS))

    def _moves(self, order: list[fx.Node]) -> Iterator[dict[fx.Node, tuple[int, ...]]]:
        """Other places for some calls: for each of the largest values that are held at the peak."""
        nodes = list(self.program.graph.nodes)
        held = self.holding.now()
        peak = held.index(max(held))
        self.at = {node: i for i, node in enumerate(order)}
        computed = (i for i, node in enumerate(order) if phase_of(node) is Phase.FORWARD and not _travels(node))
        self.turn = max(computed, default=-1) + 1  # where forward ends
        here = self.at.get(nodes[peak], len(order))
        alive = [life for life in lifetimes(self.program, staged=self.staged) if life.first <= peak <= life.last]
        for life in sorted(alive, key=lambda life: (-life.num_bytes, life.first))[:_NUM_LARGEST]:
            if life.num_bytes and not life.is_beside and life.node.target not in ops.STARTS:
                yield from self._later(life, here)
                yield from self._earlier(life, here)

    def _later(self, life: Lifetime, here: int) -> Iterator[dict[fx.Node, tuple[int, ...]]]:
        """Make a value right before its first reader, if that comes behind the peak."""
        made = life.node
        limit = self.turn if phase_of(made) is Phase.FORWARD else len(self.at)
        read = min(min((self.at[reader] for reader in self.readers[made]), default=limit), limit)
        if self.at[made] < here < read:
            for moved in ({made}, self._made_for(made)):
                yield {node: (read - 1, 1, self.at[node]) for node in moved}

    def _made_for(self, made: fx.Node) -> set[fx.Node]:
        """A call, and what is made for it alone in its phase."""
        found, stack = {made}, [made]
        while stack:
            for source in stack.pop().all_input_nodes:
                alone = source in self.at and phase_of(source) is phase_of(made) and found.issuperset(source.users)
                if alone and source not in found:
                    found.add(source)
                    stack.append(source)
        return found

    def _earlier(self, life: Lifetime, here: int) -> Iterator[dict[fx.Node, tuple[int, ...]]]:
        """Read a value for the last time before the peak, if that is possible."""
        late = {reader for reader in self.readers[life.node] if self.at[reader] > here}
        if not late or (here < self.turn and any(phase_of(reader) is not Phase.FORWARD for reader in late)):
            return
        late |= self._needed(late, here)
        for moved in (late, self._follows(late, here)):
            yield {node: (here - 1, 1, self.at[node]) for node in moved}

    def _needed(self, late: Iterable[fx.Node], here: int) -> set[fx.Node]:
        """What calls need of what stands behind the peak."""
        found: set[fx.Node] = set()
        stack = list(late)
        while stack:
            for source in stack.pop().all_input_nodes:
                if self.at.get(source, -1) > here and source not in found:
                    found.add(source)
                    stack.append(source)
        return found

    def _follows(self, first: Iterable[fx.Node], here: int) -> set[fx.Node]:
        """Calls, and what follows from them and from what is there before the peak."""
        found, stack = set(first), list(first)
        while stack:
            for user in stack.pop().users:
                ready = all(source in found or self.at.get(source, -1) < here for source in user.all_input_nodes)
                if user in self.at and user not in found and ready:
                    found.add(user)
                    stack.append(user)
        return found


def _travels(node: fx.Node) -> bool:
    return node.target in ops.STARTS or node.target is ops.wait
