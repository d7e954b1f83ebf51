"""Fit the few constants of whole steps to published ones, and say how far off they are on the others.

    python benchmarks/fit_published.py --published FILE.csv           fit, then tell errors of both halves
    python benchmarks/fit_published.py --published FILE.csv --as-is   tell errors of the constants that there are

Half of the configurations of each source (model, machine, sequence and recomputation together, drawn by a fixed seed)
are fitted, the other half predicted. What is printed as ``Constants`` is the fit to the first half: it is what
benchmarks/predicted.py has, so that errors of the other half are of rows that no constant has seen.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from accuracy import as_text, read, results_of
from peers_predicted import Case, is_fitted
from predicted import Constants, alone, costs_of, predicted
from traces import Step, steps_of

from zgraph.fitting import fit
from zgraph.work import ATTENTION, MATRIX, VECTOR

BOUNDS = {
    "hopper": (0.9, 1.6),
    "ampere": (0.9, 1.6),
    "flash_1": (1.0, 3.0),
    "vector": (0.7, 1.6),
    "link": (0.8, 2.5),
    "broadcast_s": (1e-5, 1e-1),
}


UNFITTED = Constants(1.0, 1.0, 1.0, 1.0, 1.0, 1e-3)
"""The presets as they are, and a first guess of what a broadcast takes."""


@dataclass(frozen=True)
class Parts:
    """Seconds of a step by what does the work, as the presets have it, and what of them waits for communication."""

    busy: Mapping[str, float]
    rest_s: float

    def seconds(self, case: Case, constants: Constants) -> float:
        """The step with other constants, while what waits stays what it is but for the speed of links."""
        factors = constants.factors(case)
        working = sum(factors[unit] * seconds for unit, seconds in self.busy.items())
        sent = constants.broadcast_s * case.world if case.software.broadcasts else 0
        return working + self.rest_s * constants.link + sent


def parts_of(case: Case, step: Step) -> Parts:
    """Play a step once, and take it apart."""
    hardware = alone(case.hardware())
    cost_of = costs_of(case, hardware, UNFITTED)
    busy: Counter[str] = Counter()
    for program, times in zip(step.programs, step.repeats, strict=True):
        for call in program.calls:
            for work in call.works if not call.is_start else ():
                unit = work.unit if work.unit in (MATRIX, ATTENTION) else VECTOR
                busy[unit] += times * cost_of((work,), call.is_update).seconds
    sent = UNFITTED.broadcast_s * case.world if case.software.broadcasts else 0
    return Parts(busy, predicted(case, step, UNFITTED, memory=False).step_s - sent - sum(busy.values()))


def fit_times(cases: Sequence[Case], steps: Sequence[Step]) -> Constants:
    """The constants with which times come nearest; see ``Parts``."""
    parts = [parts_of(case, step.whole_step()) for case, step in zip(cases, steps, strict=True)]

    def times(values: Sequence[float]) -> list[float]:
        constants = Constants(*values)
        return [part.seconds(case, constants) for case, part in zip(cases, parts, strict=True)]

    measured = [case.batch * case.seq * case.accumulate / (case.tokens_s or 1) for case in cases]
    found = fit(times, measured, list(astuple(UNFITTED)), list(BOUNDS.values()))
    return Constants(*(float(f"{value:.3g}") for value in found))


def main() -> int:
    """Fit to one half and tell about both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, required=True, metavar="FILE", help="a collection of measurements")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--as-is", action="store_true", help="tell errors of the constants that there are; fit nothing")
    options = parser.parse_args()
    cases, _ = read(options.published, "A")
    steps, failed = steps_of(cases, options.processes)
    cases = [case for case in cases if case.id not in failed]
    pairs = [(case, step) for case, step in zip(cases, steps, strict=True) if case.is_complete]
    constants = Constants()
    if not options.as_is:
        timed = [(case, step) for case, step in pairs if case.tokens_s is not None and is_fitted(case)]
        constants = fit_times([case for case, _ in timed], [step for _, step in timed])
    print({field.name: getattr(constants, field.name) for field in fields(constants)})
    for name, chosen in (("fitted", True), ("held out", False)):
        half = [(case, step) for case, step in pairs if is_fitted(case) is chosen]
        print(f"\n== {name}: {len(half)} rows")
        print(as_text(results_of([case for case, _ in half], [step for _, step in half], constants)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
