"""Keep buckets whole from forward to backward, where there is room, instead of gathering them twice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from zgraph import ops
from zgraph.hardware import Hardware
from zgraph.knapsack import Item, best
from zgraph.liveness import held_bytes, lifetimes
from zgraph.passes.gathers import prepares
from zgraph.pipeline import Pass
from zgraph.program import Phase, Program, Stage, operand
from zgraph.timeline import play

_PICOSECONDS = 1e12


@dataclass(frozen=True)
class Unshard(Pass):
    """Let backward read what forward has gathered, where it may stay, instead of gathering it again.

        w = wait(all_gather(s))             w = wait(all_gather(s))
        y = mm(x, t(w))                     y = mm(x, t(w))
        v = wait(all_gather(s))      ->     gx = mm(gy, w)
        gx = mm(gy, v)

    What stays without a higher peak stays in any case; those first that are held for the shortest time, which are the
    last ones of forward. Of the others, those whose gathers hold backward up the longest in all, as far as ``share``
    allows (``zgraph.knapsack``); among gathers that hold nothing up, those that occupy the links the longest.

    It comes last, since only then it is known what the peak is and what holds backward up. Nothing else moves.

    Args:
        share: of the bytes that are gathered twice, how many may stay, with those that stay in any case.
        hardware: the machine, as each rank finds it; where it is not known, gathers are compared by their bytes.
    """

    share: float = 0.0
    hardware: Hardware | None = field(default=None, repr=False)

    takes = gives = Stage.INPLACE

    def rewrite(self, program: Program) -> None:
        twice = _gathered_twice(program, staged=self._is_staged(program))
        capacity = int(self.share * sum(each.num_bytes for each in twice))
        free = self._free(program, twice)
        _keep(free)
        if not self.share:
            return
        rest = [each for each in twice if each not in free]
        capacity -= sum(each.num_bytes for each in free)
        values = self._values(program, rest)
        items = [Item(each.num_bytes, value) for each, value in zip(rest, values, strict=True)]
        _keep([rest[index] for index in best(items, capacity)])

    def _is_staged(self, program: Program) -> bool:
        """Whether collectives are zgraph's own transfers: see ``zgraph.liveness.lifetimes``."""
        assert program.layout is not None
        if self.hardware is not None:
            return self.hardware.is_staged
        return program.layout.buckets[0].device.type == "cpu"

    def _free(self, program: Program, twice: list[_Twice]) -> list[_Twice]:
        """What can stay without a higher peak."""
        alive = held_bytes(lifetimes(program, staged=self._is_staged(program)), program.num_nodes())
        peak = max(alive)
        free = []
        for each in sorted(twice, key=lambda each: (len(each.between), each.between.start)):
            if all(alive[at] + each.num_bytes <= peak for at in each.between):
                for at in each.between:
                    alive[at] += each.num_bytes
                free.append(each)
        return free

    def _values(self, program: Program, twice: list[_Twice]) -> list[tuple[int, ...]]:
        """What each second gather costs: seconds that backward waits for it, seconds on the links; and how long it is
        held otherwise.
        """
        if self.hardware is None:
            return [(each.num_bytes, -len(each.between)) for each in twice]
        events = {event.node: event for event in play(program, self.hardware).events}
        found = []
        for each in twice:
            start, wait = events[operand(each.second)], events[each.second]
            seconds = (wait.end_s - wait.start_s, start.end_s - start.start_s)
            found.append((*(round(each * _PICOSECONDS) for each in seconds), -len(each.between)))
        return found


@dataclass(frozen=True)
class _Twice:
    """Two gathers of the same.

    Attributes:
        first, second: the waits for them.
        num_bytes: of what is gathered.
        between: positions in the graph at which neither is held.
    """

    first: fx.Node
    second: fx.Node
    num_bytes: int
    between: range


def _gathered_twice(program: Program, *, staged: bool) -> list[_Twice]:
    """Each gather of parameters before the update that brings what the first one of its like has brought."""
    lives = {life.node: life for life in lifetimes(program, staged=staged) if not life.is_beside}
    firsts: dict[Any, fx.Node] = {}
    found = []
    for wait in program.graph.find_nodes(op="call_function", target=ops.wait):
        start = operand(wait)
        if start.target is not ops.all_gather or wait.meta["origin"].phase is Phase.UPDATE or prepares(start) is None:
            continue
        first = firsts.setdefault(_expression(start), wait)
        if first is not wait:
            between = range(lives[operand(first)].last + 1, lives[start].first)
            found.append(_Twice(first, wait, lives[start].num_bytes, between))
    return found


def _expression(value: Any) -> Any:
    """Equal for calls of the same on the same inputs: no parameter is written over before the update."""
    if isinstance(value, fx.Node) and value.op == "call_function":
        named = tuple((name, _expression(each)) for name, each in sorted(value.kwargs.items()))
        return (value.target, tuple(map(_expression, value.args)), named)
    return tuple(map(_expression, value)) if isinstance(value, (list, tuple)) else value


def _keep(twice: list[_Twice]) -> None:
    """Let what reads the second gathers read the first ones."""
    for each in twice:
        each.second.replace_all_uses_with(each.first)
        dead = [each.second]
        while dead:
            node = dead.pop()
            if node.op == "call_function" and not node.users:
                dead += node.all_input_nodes
                node.graph.erase_node(node)
