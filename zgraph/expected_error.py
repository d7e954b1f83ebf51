"""How far predictions were off where both a prediction and a measurement exist.

``expected_error.json`` is written by ``benchmarks/accuracy.py``; docs/plan.md has the tables behind it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class ExpectedError:
    """Absolute relative errors of one class of predictions, as fractions.

    Attributes:
        measured_on: what was measured, in words.
        memory, time: the median; None where nothing was measured.
        memory_90, time_90: what nine in ten are not above.
        num_memory, num_time: measurements behind them.
    """

    measured_on: str
    memory: float | None = None
    memory_90: float = 0.0
    num_memory: int = 0
    time: float | None = None
    time_90: float = 0.0
    num_time: int = 0

    @property
    def memory_words(self) -> str:
        """For a reader of a prediction of bytes."""
        return self._words(self.memory, self.memory_90, self.num_memory)

    @property
    def time_words(self) -> str:
        """For a reader of a prediction of seconds."""
        return self._words(self.time, self.time_90, self.num_time)

    def _words(self, error: float | None, most: float, num: int) -> str:
        if error is None:
            return "never compared with a measurement"
        return f"±{error:.1%} in the median of {num} {self.measured_on}, ±{most:.0%} for nine in ten"


@cache
def expected_error(device_type: str) -> ExpectedError:
    """For a type of device, ``"cpu"`` or ``"cuda"``."""
    table = json.loads(resources.files("zgraph").joinpath("expected_error.json").read_text())
    return ExpectedError(**table[device_type])
