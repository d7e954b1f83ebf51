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

from zgraph.footprint import held_by
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
    """What levels choose from, each way beaten by no other.

    Attributes:
        ways: with the peaks that are foreseen.
        kept_bytes: what keeping all holds.
        unforeseen_bytes: of them.
        tried: what ways have held, by number.
    """

    ways: tuple[_Way, ...]
    kept_bytes: int
    unforeseen_bytes: int
    tried: dict[int, int]


QUARTERS = (0.25, 0.5, 0.75, 1.0)
"""Levels of which none has a higher peak than one before, as each takes the lowest peak of those up to it."""

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
        level: from 0, where nothing is dropped, to 1. A higher one never has less to compute, nor a higher peak than a
            quarter that is not above it.
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
        chosen = _Chosen(self, program)
        make_again(program, _calls(program, chosen.way()))
        program.notes += chosen.notes


class _Chosen:
    """The choice for a level, whose peak has been seen to be what it has to be.

    What the passes make of a program without some activations may hold a little more than was foreseen: where a call
    runs again, say, parameters are gathered earlier, and the one whose gather follows with them; and on a CPU tensors
    lie in an arena with gaps, beside what operators work in. So a choice counts once they have been tried on it. The
    lowest peak is that of the last choice on the frontier, as tried. Then the level says bytes, and of the choices that
    are foreseen to stay below these the first is taken that does. No lower level takes a later one, as it starts to
    look no later and is content with more. But what it takes may happen to have the lower peak: then it is taken for
    the higher one, too, if it is one of ``QUARTERS``.

    Attributes:
        notes: how near the best a choice is that a solver was asked for.
    """

    def __init__(self, made: RecomputeActivations, program: Program) -> None:
        self.made, self.program = made, program
        self.notes: tuple[str, ...] = ()
        self._found = self._find()
        self.ways = self._found.ways

    def _find(self) -> _Ways:
        """The ways, worked out once for a program and the passes that follow."""
        known = [] if self.made.known is None else self.made.known.setdefault(self.program.digest(), [])
        found = next((ways for then, ways in known if then == self.made.then), None)
        if found is None:
            ways = tuple(self._way(choice) for choice in frontier(self._profile))
            kept_bytes = held_by(self._passed, self.made.hardware).peak_bytes
            found = _Ways(ways, kept_bytes, kept_bytes - self._profile.kept.peak_bytes, {})
            known.append((self.made.then, found))
        return found

    @cached_property
    def _profile(self) -> Profile:
        return Profile(self.program, self._passed, self.made.hardware)

    @cached_property
    def _passed(self) -> Program:
        """What the passes make of it with all kept."""
        return run(self.made.then, marked(self.program), prove=False).program

    def _way(self, choice: Choice) -> _Way:
        again = self._profile.again(choice.dropped)
        positions = frozenset(i for i, node in enumerate(self.program.graph.nodes) if node in again)
        return _Way(positions, choice.peak_bytes, choice.seconds)

    def way(self) -> _Way:
        """What runs again."""
        level = self.made.level
        most = self._most_bytes(level)
        numbers = [self._first(self._most_bytes(lower)) for lower in QUARTERS if lower < level]
        taken = self.ways[min((*numbers, self._first(most)), key=lambda number: (self._peak_bytes(number), number))]
        if self.made.solver == "milp":
            found = optimum(self._profile, most - self._found.unforeseen_bytes)
            if found.choice is not None and found.choice.seconds < taken.seconds:
                optimal = self._way(found.choice)
                if self._tried_bytes(optimal) <= most:
                    taken = optimal
            bound = f"at most {found.gap(taken.seconds):.1%} of it more than the best choice"
            if math.isinf(found.bound_s):
                bound = "and no choice was foreseen to hold so little"
            self.notes = (f"recompute_solver='milp': what runs again takes {1e3 * taken.seconds:.3g} ms, {bound}",)
        return taken

    def _most_bytes(self, level: float) -> int:
        """The peak that a level may have."""
        highest = self._found.kept_bytes
        return math.floor(highest - level * (highest - self._peak_bytes(self._end)))

    @cached_property
    def _end(self) -> int:
        """The number of the last way that lowers the peak."""
        end = len(self.ways) - 1
        while end and self._peak_bytes(end) >= self._found.kept_bytes:
            end -= 1
        return end

    def _first(self, most: int) -> int:
        """The number of the fastest way whose peak is so low, as tried."""
        foreseen = most - self._found.unforeseen_bytes
        first = next((i for i in range(self._end) if self.ways[i].peak_bytes <= foreseen), self._end)
        return next((i for i in range(first, self._end) if self._peak_bytes(i) <= most), self._end)

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
        return held_by(tried, self.made.hardware).peak_bytes


def _calls(program: Program, way: _Way) -> set[fx.Node]:
    return {node for i, node in enumerate(program.graph.nodes) if i in way.again}
