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
    """Median absolute relative error of one class of predictions.

    Attributes:
        memory, time: as fractions; None where nothing was measured.
        num_memory, num_time: measurements behind them.
        measured_on: what was measured, in words.
    """

    memory: float | None
    time: float | None
    num_memory: int
    num_time: int
    measured_on: str

    @property
    def memory_words(self) -> str:
        """For a reader of a prediction of bytes."""
        return self._words(self.memory, self.num_memory)

    @property
    def time_words(self) -> str:
        """For a reader of a prediction of seconds."""
        return self._words(self.time, self.num_time)

    def _words(self, error: float | None, num: int) -> str:
        if error is None:
            return "never compared with a measurement"
        return f"±{error:.0%} in the median of {num} measurements of {self.measured_on}"


@cache
def expected_error(device_type: str) -> ExpectedError:
    """For a type of device, ``"cpu"`` or ``"cuda"``."""
    table = json.loads(resources.files("zgraph").joinpath("expected_error.json").read_text())
    return ExpectedError(**table[device_type])
