"""When each call of a step has ended: a ``zgraph.codegen.emit.Watch`` that reads the clock, or the device's.

On a CPU it costs a fraction of a microsecond a call while it is on. Elsewhere calls are only issued when the host is
done with them, so an event behind each is recorded on the stream, and read once all of them have run. A step that
nobody measures is emitted without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch


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


Moment = float | torch.Event


class Stopwatch:
    """Notes the time after each call.

    Args:
        device_type: where the calls run.
    """

    needs_values = False

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._numbers: list[int] = []
        self._times: list[Moment] = []
        self._runs: list[tuple[list[int], list[Moment]]] = []

    def begin(self, inputs: Sequence[Any]) -> None:
        """A run begins."""
        self._numbers, self._times = [], [self._now()]
        self._runs.append((self._numbers, self._times))

    def see(self, number: int) -> None:
        """The call of this number has run."""
        self._times.append(self._now())
        self._numbers.append(number)

    def measured(self, num_calls: int) -> Measured | None:
        """The run of median length, the shorter of two; None if there is none.

        Args:
            num_calls: that a run makes; one with fewer has failed, and does not count.
        """
        whole = [run for run in self._runs if len(run[0]) == num_calls]
        if not whole:
            return None
        lengths = tuple(_seconds(times[0], times[-1]) for _, times in whole)
        middle = sorted(range(len(whole)), key=lengths.__getitem__)[(len(whole) - 1) // 2]
        numbers, times = whole[middle]
        return Measured(tuple(numbers), tuple(_seconds(times[0], time) for time in times[1:]), lengths)

    def _now(self) -> Moment:
        if self._device_type == "cpu":
            return perf_counter()
        event = torch.Event(self._device_type, enable_timing=True)
        event.record()
        return event


def _seconds(first: Moment, last: Moment) -> float:
    if isinstance(first, float):
        assert isinstance(last, float)
        return last - first
    assert not isinstance(last, float)
    last.synchronize()
    return first.elapsed_time(last) / 1e3
