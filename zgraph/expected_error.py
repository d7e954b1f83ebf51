"""How far predictions were off where both a prediction and a measurement exist.

``expected_error.json`` is written by ``benchmarks/accuracy.py --write``; docs/accuracy.md has the tables behind it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Spread:
    """Absolute relative errors, as fractions: the median, what nine in ten are not above, and how many there are."""

    median: float
    ninth_decile: float
    num: int


@dataclass(frozen=True)
class ExpectedError:
    """Errors of one class of predictions; None where nothing was measured.

    Attributes:
        measured_on: what was measured, in words.
        live: of the bytes that tensors hold at the peak.
        reserved: of the bytes that are taken for them: of a GPU by the allocator, on a CPU resident.
        time: of seconds.
    """

    measured_on: str
    live: Spread | None = None
    reserved: Spread | None = None
    time: Spread | None = None

    def words(self, what: str) -> str:
        """For the reader of a prediction of ``live``, ``reserved`` or ``time``."""
        spread: Spread | None = getattr(self, what)
        if spread is None:
            return "never compared with a measurement"
        least, most = f"\N{PLUS-MINUS SIGN}{spread.median:.1%}", f"\N{PLUS-MINUS SIGN}{spread.ninth_decile:.0%}"
        return f"{least} in the median of {spread.num} {self.measured_on}, {most} for nine in ten"


NOTHING_MEASURED = ExpectedError("steps")


@cache
def expected_error(device_type: str, name: str) -> ExpectedError:
    """For a machine.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        name: of the machine; of GPUs, only those whose steps were compared have an error.
    """
    entry = json.loads(resources.files("zgraph").joinpath("expected_error.json").read_text())[device_type]
    if name not in entry.get("machines", [name]):
        return NOTHING_MEASURED
    spreads = {name: Spread(**entry[name]) for name in ("live", "reserved", "time") if name in entry}
    return ExpectedError(entry["measured_on"], **spreads)
