"""When each call of a step that runs on a CPU has ended: a ``zgraph.codegen.emit.Watch`` that reads the clock.

It costs a fraction of a microsecond a call while it is on. A step that nobody measures is emitted without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One run of a program, the median of several.

    Attributes:
        numbers: of its calls in the graph, in the order in which they ran.
        ends: seconds from its beginning to the end of each.
        steps: seconds of each run.
    """

    numbers: tuple[int, ...]
    ends: tuple[float, ...]
    steps: tuple[float, ...]


class Stopwatch:
    """Notes the time after each call."""

    needs_values = False

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._times: list[float] = []
        self._runs: list[tuple[list[int], list[float]]] = []

    def begin(self, inputs: Sequence[Any]) -> None:
        """A run begins."""
        self._numbers, self._times = [], [perf_counter()]
        self._runs.append((self._numbers, self._times))

    def see(self, number: int) -> None:
        """The call of this number has run."""
        self._times.append(perf_counter())
        self._numbers.append(number)

    def measured(self, num_calls: int) -> Measured | None:
        """The run of median length, the shorter of two; None if there is none.

        Args:
            num_calls: that a run makes; one with fewer has failed, and does not count.
        """
        whole = [run for run in self._runs if len(run[0]) == num_calls]
        if not whole:
            return None
        runs = sorted(whole, key=lambda run: run[1][-1] - run[1][0])
        numbers, times = runs[(len(runs) - 1) // 2]
        lengths = tuple(times[-1] - times[0] for _, times in whole)
        return Measured(tuple(numbers), tuple(time - times[0] for time in times[1:]), lengths)
