"""Seconds in which computing waits for communication, measured beside predicted, on this machine's ranks.

    torchrun --nproc-per-node 2 benchmarks/exposed.py                     GPTs of 10.6M and 135.6M parameters
    torchrun --nproc-per-node 2 benchmarks/exposed.py --models small --steps 15

On a CPU nothing is hidden: the cores that compute also move what travels. Measured is what collectives and their waits
take of a step in which the clock is read after each call (``model.profile``), by the rank that waits least for the
other. Run ``zgraph calibrate`` before: predictions rest on it.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.distributed as dist
from models import SHAPES, build_batch, build_model

import zgraph
from zgraph import ops
from zgraph.timeline import play


def seconds(runtime: Any) -> tuple[float, float]:
    """Of the profiled step of median length: of all calls, and of those that communicate."""
    executable = runtime.last().executable
    measured = runtime.measured(executable)
    nodes = list(executable.program.graph.nodes)
    exposed = before = 0.0
    for number, end in zip(measured.numbers, measured.ends, strict=True):
        if nodes[number].target in (*ops.STARTS, ops.wait):
            exposed += end - before
        before = end
    return measured.ends[-1], exposed


def main() -> None:
    """Print a line for each model and stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["small", "medium"])
    parser.add_argument("--steps", type=int, default=5, help="that are measured (default: 5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print("| model | ZeRO | step | predicted | exposed | predicted |\n| --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        for zero in range(4):
            shape = SHAPES[name]
            model: Any = build_model(shape)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            zgraph.compile(model, optimizer=optimizer, zero=zero, progress=False)
            batch = build_batch(shape, num_ranks, range(rank, rank + 1))
            for _ in range(2):
                model.train_step(*batch)
            model.profile(options.steps)
            for _ in range(options.steps):
                model.train_step(*batch)
            every: list[Any] = [None] * num_ranks
            runtime = model.__dict__["_zgraph"]
            dist.all_gather_object(every, seconds(runtime))
            timeline = play(runtime.last().executable.program, runtime.hardware)
            step, exposed = statistics.median(each[0] for each in every), min(each[1] for each in every)
            if rank == 0:
                print(
                    f"| {name} | {zero} | {step * 1e3:.0f} ms | {timeline.step_s * 1e3:.0f} ms "
                    f"| {exposed * 1e3:.1f} ms | {timeline.exposed_s * 1e3:.1f} ms |",
                    flush=True,
                )
            del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
