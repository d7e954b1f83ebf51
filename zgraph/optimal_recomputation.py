"""The fastest choice of what to drop for a given peak, by mixed-integer linear programming: for small programs.

Seconds are linear in what runs again. Bytes are not: where a call runs again depends on the choice. So the program has
what holds for every choice (what is kept is held from its last use in forward to its first in backward), and a choice
that turns out to be above the peak is ruled out, until one is not. The first that is not is the best there is; if there
are too many, the last one's seconds are still less than any choice can have, which bounds how far a found one is off.
What ends the search is a number of choices, not a time, so that all ranks end alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from zgraph.errors import OptionError
from zgraph.frontier import Choice
from zgraph.recomputation import Profile

MOST_RULED_OUT = 20
"""Solutions, of which each takes from a twentieth of a second to one; many are often as fast as each other."""

MOST_CANDIDATES = 64
"""More of them than this are refused: a solver may not come to an end."""


@dataclass(frozen=True)
class Optimum:
    """What the solver has found.

    Attributes:
        choice: the fastest within the peak; None if it was not found.
        bound_s: no choice within the peak takes fewer seconds. Infinite if there is none.
    """

    choice: Choice | None
    bound_s: float

    def gap(self, seconds: float) -> float:
        """By which part of itself a choice of so many seconds is longer than the best may be; 0 if it is the best."""
        return 0.0 if seconds <= self.bound_s else (seconds - self.bound_s) / seconds


def optimum(profile: Profile, most_bytes: int, *, most_ruled_out: int = MOST_RULED_OUT) -> Optimum:
    """The fastest choice whose peak is at most ``most_bytes``.

    Args:
        profile: of the program.
        most_bytes: of all that is held at once.
        most_ruled_out: how often to solve.

    Raises:
        OptionError: SciPy is not installed; there are more than ``MOST_CANDIDATES``.
    """
    if len(profile.candidates) > MOST_CANDIDATES:
        raise OptionError(
            f"recompute_solver='milp' is for at most {MOST_CANDIDATES} activations, and there are "
            f"{len(profile.candidates)}",
            fix="leave it out",
        )
    return _Problem(profile, most_bytes).solve(most_ruled_out)


class _Problem:
    """Variables between 0 and 1: whether each candidate is dropped, then whether each call of forward runs again.

    A call runs again if its result is dropped and read, or if one that runs again needs what is not kept of it. As
    seconds are minimised, no call runs again without a reason: whole numbers for candidates give whole ones for all.
    """

    def __init__(self, profile: Profile, most_bytes: int) -> None:
        self.profile, self.most_bytes = profile, most_bytes
        self.candidates = {memory: i for i, memory in enumerate(profile.candidates)}
        reached = profile.again(frozenset(profile.candidates))
        self.calls = {node: len(self.candidates) + i for i, node in enumerate(reached)}
        self.num = len(self.candidates) + len(self.calls)
        self.rows: list[dict[int, float]] = []
        self.least: list[float] = []
        self._run_again()
        self._stay_below()

    def _add(self, row: dict[int, float], least: float) -> None:
        self.rows.append(row)
        self.least.append(least)

    def _run_again(self) -> None:
        for memory, i in self.candidates.items():
            for node, _ in self.profile.lives[memory].reads:
                self._add({self.calls[node]: 1, i: -1}, 0)
        for node, i in self.calls.items():
            for source in node.all_input_nodes:
                if source in self.calls:
                    memory = self.profile.owner[source]
                    if memory in self.candidates:
                        self._add({self.calls[source]: 1, i: -1, self.candidates[memory]: -1}, -1)
                    else:
                        self._add({self.calls[source]: 1, i: -1}, 0)

    def _stay_below(self) -> None:
        """Bytes with all kept, less those dropped that are not needed at the time.

        What backward gathers counts from where it waits for it, as it is there then in any case. Of the positions where
        the same candidates are not needed, the highest is enough.
        """
        highest: dict[frozenset[int], int] = {}
        freed: list[set[int]] = [set() for _ in range(self.profile.num_positions)]
        for memory, i in self.candidates.items():
            life = self.profile.lives[memory]
            for position in range(life.last_forward + 1, min(at for _, at in life.reads)):
                freed[position].add(i)
        alive = self.profile.kept.alive_bytes.copy()
        for gather in self.profile.gathers.values():
            alive[gather.first : gather.wait] -= gather.num_bytes
        for held, mine in zip(alive.tolist(), map(frozenset, freed), strict=True):
            highest[mine] = max(highest.get(mine, 0), held)
        sizes = {i: self.profile.lives[memory].num_bytes for memory, i in self.candidates.items()}
        for mine, held in highest.items():
            if held > self.most_bytes:
                self._add({i: sizes[i] / self.most_bytes for i in mine}, held / self.most_bytes - 1)

    def solve(self, most_ruled_out: int) -> Optimum:
        """Solve, look at the choice, rule it out, until none that is left can be faster than the best so far."""
        best: Choice | None = None
        bound_s = 0.0
        for _ in range(most_ruled_out):
            dropped = self._solved()
            if dropped is None:
                return Optimum(best, best.seconds if best is not None else float("inf"))
            bound_s = sum(map(self.profile.seconds_of, self.profile.again(dropped)))
            if best is not None and bound_s >= best.seconds:
                return Optimum(best, best.seconds)
            outcome = self.profile.outcome(dropped)
            if outcome.peak_bytes <= self.most_bytes and (best is None or outcome.seconds < best.seconds):
                best = Choice(dropped, outcome.peak_bytes, outcome.seconds)
            chosen = {i for memory, i in self.candidates.items() if memory in dropped}
            self._add({i: -1 if i in chosen else 1 for i in self.candidates.values()}, 1 - len(chosen))
        return Optimum(best, bound_s)

    def _solved(self) -> frozenset[fx.Node] | None:
        """The fastest choice that the rows allow; None if they allow none."""
        milp, constraint, bounds = _scipy()
        costs = np.zeros(self.num)
        each = {node: self.profile.seconds_of(node) for node in self.calls}
        scale = max([*each.values(), 1e-12])
        for node, i in self.calls.items():
            costs[i] = each[node] / scale
        matrix = np.zeros((len(self.rows), self.num))
        for row, of_row in zip(matrix, self.rows, strict=True):
            for i, factor in of_row.items():
                row[i] = factor
        is_whole = np.zeros(self.num)
        is_whole[: len(self.candidates)] = 1
        rows = [constraint(matrix, np.array(self.least) - 1e-9, np.inf)] if self.rows else []
        found = milp(costs, integrality=is_whole, bounds=bounds(0, 1), constraints=rows, options={"mip_rel_gap": 0})
        if found.status == _INFEASIBLE:
            return None
        assert found.status == 0, found.message
        return frozenset(memory for memory, i in self.candidates.items() if found.x[i] > 0.5)


_INFEASIBLE = 2
"""A status of ``scipy.optimize.milp``."""


def _scipy() -> tuple[Any, Any, Any]:
    """What is needed of SciPy, which is not a dependency of all else."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise OptionError(
            "the best choice of what to recompute is found by SciPy, which is not installed",
            fix="pip install scipy, or leave recompute_solver out",
        ) from error
    return milp, LinearConstraint, Bounds
