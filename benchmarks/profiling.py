"""What ``model.profile`` costs the steps that it measures, and what it shows: measured lanes beside predicted ones.

    python benchmarks/profiling.py                                 the GPT of 10.6M parameters on two gloo ranks
    python benchmarks/profiling.py --model medium --rounds 3       the one of 135.6M
    python benchmarks/profiling.py --report lanes.html             and the page that has the lanes
    python benchmarks/profiling.py --quick                         a tiny one, in a few seconds: does everything run?

Steps that are measured and steps that are not take turns; told are medians of the rounds' ratios, of seconds and of
CPU seconds of the thread that runs the step, which a busy machine disturbs less. The first step after ``profile``, in
which a twin of the step that reads the clock is made, is told apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from models import SHAPES, Shape, build_batch, build_model

import zgraph
from zgraph.launching import launch_ranks
from zgraph.report.runs import unrolled

BOUND = 1.03
"""What measuring may cost, as a ratio."""


@dataclass(frozen=True)
class Found:
    """What one rank found.

    Attributes:
        num_calls: of a step.
        step_s: of a step that is not measured, the median.
        ratios, cpu_ratios: of each round: seconds, and CPU seconds, of steps that are measured to those that are not.
        first_s: of the first step after ``profile``, the median.
        predicted_s, measured_s: of the step that the report shows.
        expected: error of predictions on such machines that nine in ten are not above; None where it is not known.
        same_order: whether the calls that were measured are those that were predicted, in the same order.
    """

    num_calls: int
    step_s: float
    ratios: list[float]
    cpu_ratios: list[float]
    first_s: float
    predicted_s: float
    measured_s: float
    expected: float | None
    same_order: bool


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a step, and CPU seconds of this thread."""
    wall, own = time.perf_counter(), time.thread_time()
    step()
    return time.perf_counter() - wall, time.thread_time() - own


def measure(shape: Shape, rounds: int, steps: int, path: str | None, rank: int = 0, num_ranks: int = 1) -> Found:
    """Train with and without, in turns, and report the last step.

    Args:
        shape: of the GPT.
        rounds: how many turns each has.
        steps: of a turn.
        path: where rank 0 writes a page; nowhere if None.
        rank, num_ranks: which this is, of how many.
    """
    torch.set_num_threads(1)
    model: Any = build_model(shape)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model = zgraph.compile(model, optimizer=optimizer, zero=3, progress=False)
    batch = build_batch(shape, num_ranks, range(rank, rank + 1))

    def step() -> float:
        return float(model.train_step(*batch))

    for _ in range(3):
        step()
    ratios: list[float] = []
    cpu_ratios: list[float] = []
    plain_s: list[float] = []
    first_s: list[float] = []
    for _ in range(rounds):
        model.profile(steps=steps + 1)
        first_s.append(timed(step)[0])
        on, off = ([timed(step) for _ in range(steps)] for _ in range(2))
        ratios.append(sum(wall for wall, _ in on) / sum(wall for wall, _ in off))
        cpu_ratios.append(sum(own for _, own in on) / sum(own for _, own in off))
        plain_s.append(sum(wall for wall, _ in off) / steps)
    report = model.report(path if rank == 0 else None)
    (program,) = report.document["programs"]
    order = list(unrolled(program["passes"][-1]["order"]))
    ran = [order[position] for position in program["measured"]["position"]]
    predicted = program["events"]["row"]
    spread = model.plan.error.time
    return Found(
        len(ran),
        median(plain_s),
        ratios,
        cpu_ratios,
        median(first_s),
        model.plan.chosen.step_s,
        program["measured"]["end_s"][-1],
        spread.ninth_decile if spread is not None else None,
        [row for row in ran if row in set(predicted)] == predicted,
    )


def on_rank(shape: Shape, rounds: int, steps: int, path: str | None) -> Found:
    """``measure``, on each of the ranks that train together."""
    dist.init_process_group("gloo")
    try:
        return measure(shape, rounds, steps, path, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def in_words(found: Found) -> str:
    """What is printed."""
    off = found.measured_s / found.predicted_s - 1
    expected = "" if found.expected is None else f"; nine in ten are within ±{found.expected:.0%}"
    return (
        f"{found.num_calls:,} calls, {found.step_s * 1e3:.0f} ms a step\n"
        f"measured, it takes {median(found.ratios) - 1:+.1%} of its seconds and {median(found.cpu_ratios) - 1:+.1%}"
        f" of its CPU seconds, medians of {len(found.ratios)} rounds; the first one took {found.first_s:.2f} s\n"
        f"predicted {found.predicted_s * 1e3:.0f} ms, measured {found.measured_s * 1e3:.0f} ms ({off:+.1%}{expected});"
        f" the calls run in {'the' if found.same_order else 'ANOTHER'} order in which they were predicted"
    )


def main() -> int:
    """Measure and print; the exit status is 1 where measuring costs more than 3 % of CPU seconds, or orders differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Shape.parse, default=SHAPES["small"], help="a name or sizes, as step.py takes")
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks (2)")
    parser.add_argument("--rounds", type=int, default=9, help="turns that each has (9)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn (3)")
    parser.add_argument("--report", metavar="HTML", help="write the page of rank 0's step")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    given = parser.parse_args()
    shape, rounds = (SHAPES["tiny"], 1) if given.quick else (given.model, given.rounds)
    turns = shape, rounds, given.steps, given.report
    found = measure(*turns) if given.ranks == 1 else launch_ranks(on_rank, given.ranks, *turns)[0]
    print(json.dumps(asdict(found)) if given.json else in_words(found))
    return int(not found.same_order or (not given.quick and median(found.cpu_ratios) > BOUND))


if __name__ == "__main__":
    sys.exit(main())
