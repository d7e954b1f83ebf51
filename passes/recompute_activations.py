"""Compute again the activations that lower the peak most for the time that it takes, wherever they are made.

Unlike ``RecomputeModules`` this needs no blocks: it decides for each tensor, by the peak of the whole schedule
(``zgraph.recomputation``) and the seconds on a machine (``zgraph.frontier``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """

    level: float
    hardware: Hardware
    then: tuple[Pass, ...]
    solver: str | None = None

    takes, gives = Stage.CAPTURED, Stage.CAPTURED

    def rewrite(self, program: Program) -> None:
        profile = Profile(program, run(self.then, marked(program), prove=False).program, self.hardware)
        dropped = _Chosen(self, program, profile).dropped()
        make_again(program, profile.again(dropped).keys())


class _Chosen:
    """The choice for a level, whose peak has been seen to be what it has to be.

    What the passes make of a program without some activations may hold a little more than was foreseen: where a call
    runs again, say, parameters are gathered earlier, and the one whose gather follows with them. So a choice counts
    once they have been tried on it. The lowest peak is that of the last choice on the frontier, as tried. Then the
    level says bytes, and of the choices that are foreseen to stay below these the first is taken that does. No lower
    level takes a later one, as it starts to look no later and is content with more.
    """

    def __init__(self, made: RecomputeActivations, program: Program, profile: Profile) -> None:
        self.made, self.program, self.profile = made, program, profile
        self.choices = frontier(profile)
        self._tried: dict[int, int] = {}

    def dropped(self) -> frozenset[fx.Node]:
        """What is not kept."""
        highest = self.profile.kept.peak_bytes
        end = len(self.choices) - 1
        while end and self._peak_bytes(end) >= highest:
            end -= 1
        most = math.floor(highest - self.made.level * (highest - self._peak_bytes(end)))
        first = next(i for i in range(end + 1) if self.choices[i].peak_bytes <= most or i == end)
        taken = next(i for i in range(first, end + 1) if self._peak_bytes(i) <= most)
        best = optimum(self.profile, most).choice if self.made.solver == "milp" else None
        if best is not None and best.seconds < self.choices[taken].seconds and self._tried_bytes(best) <= most:
            return best.dropped
        return self.choices[taken].dropped

    def _peak_bytes(self, index: int) -> int:
        """What the schedule holds with a choice."""
        if index not in self._tried:
            self._tried[index] = self._tried_bytes(self.choices[index])
        return self._tried[index]

    def _tried_bytes(self, choice: Choice) -> int:
        if not choice.dropped:
            return self.profile.kept.peak_bytes
        copy = self.program.clone()
        copies = dict(zip(self.program.graph.nodes, copy.graph.nodes, strict=True))
        make_again(copy, {copies[node] for node in self.profile.again(choice.dropped)})
        tried = run(self.made.then, copy, prove=False).program
        return footprint(tried, staged=self.made.hardware.is_staged).peak_bytes
