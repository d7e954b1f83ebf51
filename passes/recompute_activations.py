"""Compute again the activations that lower the peak most for the time that it takes, wherever they are made.

Unlike ``RecomputeModules`` this needs no blocks: it decides for each tensor, by the peak of the whole schedule
(``zgraph.recomputation``) and the seconds on a machine (``zgraph.frontier``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from zgraph.footprint import footprint
from zgraph.frontier import Choice, frontier
from zgraph.hardware import Hardware
from zgraph.optimal_recomputation import optimum
from zgraph.passes.again import make_again
from zgraph.pipeline import Pass, run
from zgraph.program import Program, Stage
from zgraph.recomputation import Profile, marked


@dataclass(frozen=True)
class _Way:
    """Which calls run again, by their positions in the program, and what is foreseen of it."""

    again: frozenset[int]
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Ways:
    """What levels choose from, each way beaten by no other; what keeping all holds, and what ways held when tried."""

    ways: tuple[_Way, ...]
    kept_bytes: int
    tried: dict[int, int]


Levels = dict[Any, list[tuple[tuple[Pass, ...], _Ways]]]
"""What levels were chosen from on one machine, by program, and by the passes that follow."""


@dataclass(frozen=True)
class RecomputeActivations(Pass):
    """Go ``level`` of the way from the peak with all activations kept to the lowest that dropping some can reach.

        h = mm(x, v)                            h = mm(x, v)
        y = gelu(h)                             y = gelu(h)
        z = mm(y, w)                            z = mm(y, w)            # y is free from here
        ...                             ->      ...
        gw = mm(t(y), gz)                       y2 = gelu(h)
        gy = mm(gz, t(w))                       gw = mm(t(y2), gz)
        gh = gelu_backward(gy, h)               gy = mm(gz, t(w))
                                                gh = gelu_backward(gy, h)

    What is decided here is decided by the peak of what will run, gathered parameters and gradients on their way
    included. They are not there yet, so the passes that follow are tried on a copy to see where they come to lie.

    Args:
        level: from 0, where nothing is dropped, to 1. A higher one never has a higher peak, nor less to compute.
        hardware: the machine, whose seconds are weighed against bytes.
        then: the passes that follow this one.
        solver: ``"milp"`` looks for the fastest choice for the bytes that the level says; see
            ``zgraph.optimal_recomputation``. Without, it is a greedy one.
        known: what other levels have chosen from, for the programs of one model; it grows. None to keep nothing.
    """

    level: float
    hardware: Hardware
    then: tuple[Pass, ...]
    solver: str | None = None
    known: Levels | None = field(default=None, compare=False, repr=False)

    takes, gives = Stage.CAPTURED, Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        make_again(program, _calls(program, _Chosen(self, program).way()))


class _Chosen:
    """The choice for a level, whose peak has been seen to be what it has to be.

    What the passes make of a program without some activations may hold a little more than was foreseen: where a call
    runs again, say, parameters are gathered earlier, and the one whose gather follows with them. So a choice counts
    once they have been tried on it. The lowest peak is that of the last choice on the frontier, as tried. Then the
    level says bytes, and of the choices that are foreseen to stay below these the first is taken that does. No lower
    level takes a later one, as it starts to look no later and is content with more.
    """

    def __init__(self, made: RecomputeActivations, program: Program) -> None:
        self.made, self.program = made, program
        self._found = self._find()
        self.ways = self._found.ways

    def _find(self) -> _Ways:
        """The ways, worked out once for a program and the passes that follow."""
        known = [] if self.made.known is None else self.made.known.setdefault(self.program.digest(), [])
        found = next((ways for then, ways in known if then == self.made.then), None)
        if found is None:
            ways = tuple(self._way(choice) for choice in frontier(self._profile))
            found = _Ways(ways, self._profile.kept.peak_bytes, {})
            known.append((self.made.then, found))
        return found

    @cached_property
    def _profile(self) -> Profile:
        passed = run(self.made.then, marked(self.program), prove=False).program
        return Profile(self.program, passed, self.made.hardware)

    def _way(self, choice: Choice) -> _Way:
        again = self._profile.again(choice.dropped)
        positions = frozenset(i for i, node in enumerate(self.program.graph.nodes) if node in again)
        return _Way(positions, choice.peak_bytes, choice.seconds)

    def way(self) -> _Way:
        """What runs again."""
        highest = self._found.kept_bytes
        end = len(self.ways) - 1
        while end and self._peak_bytes(end) >= highest:
            end -= 1
        most = math.floor(highest - self.made.level * (highest - self._peak_bytes(end)))
        first = next(i for i in range(end + 1) if self.ways[i].peak_bytes <= most or i == end)
        taken = next(i for i in range(first, end + 1) if self._peak_bytes(i) <= most)
        best = optimum(self._profile, most).choice if self.made.solver == "milp" else None
        if best is not None and best.seconds < self.ways[taken].seconds:
            optimal = self._way(best)
            if self._tried_bytes(optimal) <= most:
                return optimal
        return self.ways[taken]

    def _peak_bytes(self, index: int) -> int:
        """What the schedule holds with a way."""
        tried = self._found.tried
        if index not in tried:
            tried[index] = self._tried_bytes(self.ways[index])
        return tried[index]

    def _tried_bytes(self, way: _Way) -> int:
        if not way.again:
            return self._found.kept_bytes
        copy = self.program.clone()
        make_again(copy, _calls(copy, way))
        tried = run(self.made.then, copy, prove=False).program
        return footprint(tried, staged=self.made.hardware.is_staged).peak_bytes


def _calls(program: Program, way: _Way) -> set[fx.Node]:
    return {node for i, node in enumerate(program.graph.nodes) if i in way.again}
