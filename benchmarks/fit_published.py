"""Fit the few constants of whole steps to published ones, and say how far off they are on those they were not fitted to.

    python benchmarks/fit_published.py --published FILE.csv

Half of the configurations of each source (model, machine, sequence and recomputation together, drawn by a fixed seed)
are fitted, the other half predicted. What is printed as ``Constants`` is the fit to the first half: it is what
benchmarks/predicted.py has, so that errors of the other half are of rows that no constant has seen.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

from accuracy import as_text, read, results_of
from peers_predicted import Case
from predicted import Constants, predicted
from traces import Step, steps_of

from zgraph.fitting import fit

SEED = 0
BOUNDS = {"matrix": (0.8, 1.6), "attention": (0.5, 2.0), "vector": (0.6, 2.0), "link": (0.7, 2.5)}
STEPS = 5


def is_fitted(case: Case) -> bool:
    """Whether constants are fitted to a row: to half of the configurations, drawn by a fixed seed."""
    key = (case.source, case.model.name, case.machine, case.seq, case.recompute)
    return random.Random(f"{SEED} {key}").random() < 0.5


def fit_times(cases: Sequence[Case], steps: Sequence[Step]) -> Constants:
    """The constants with which times come nearest."""
    whole = [step.whole_step() for step in steps]

    def times(values: Sequence[float]) -> list[float]:
        constants = Constants(*values)
        return [predicted(case, step, constants, memory=False).step_s for case, step in zip(cases, whole, strict=True)]

    measured = [case.batch * case.seq * case.accumulate / (case.tokens_s or 1) for case in cases]
    found = fit(times, measured, list(astuple(Constants()))[: len(BOUNDS)], list(BOUNDS.values()), STEPS)
    return Constants(*(float(f"{value:.3g}") for value in found))


def main() -> int:
    """Fit to one half and tell about both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, required=True, metavar="FILE", help="a collection of measurements")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    cases, _ = read(options.published, "A")
    steps, failed = steps_of(cases, options.processes)
    cases = [case for case in cases if case.id not in failed]
    pairs = [(case, step) for case, step in zip(cases, steps, strict=True) if case.is_complete]
    timed = [(case, step) for case, step in pairs if case.tokens_s is not None and is_fitted(case)]
    constants = fit_times([case for case, _ in timed], [step for _, step in timed])
    held = [r for r in results_of(*zip(*pairs, strict=True), constants) if r.measured_peak_gib and r.peak_kind == "reserved"]
    mine = {case.id for case, _ in pairs if is_fitted(case)}
    ratios = [(r.measured_peak_gib or 0) / r.peak_gib for r in held if r.id in mine]
    if ratios:
        constants = Constants(*astuple(constants)[: len(BOUNDS)], fragments=float(f"{statistics.median(ratios):.3g}"))
    print({field.name: getattr(constants, field.name) for field in fields(constants)})
    for name, chosen in (("fitted", True), ("held out", False)):
        half = [(case, step) for case, step in pairs if is_fitted(case) is chosen]
        print(f"\n== {name}: {len(half)} rows")
        print(as_text(results_of([case for case, _ in half], [step for _, step in half], constants)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
