"""Optimizer state on a disk: what it costs in time, and saves in memory, beside the disk's own pace in the same run.

    python benchmarks/offload.py                    the small GPT on two ranks
    python benchmarks/offload.py --model medium     the 135.6M GPT
    python benchmarks/offload.py --quick            a tiny one: does it run?

Peers take turns step by step, as in ``step.py``. Then the disk is measured: all ranks at once move as many bytes as a
step does, each way, with nothing to compute meanwhile. A step with state on the disk can be no faster than the slower
one of the two; ``/ bound`` is how near it comes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

from memory import load_malloc_counter

BLOCK = 2**24
ROUNDS = 3


def main() -> int:
    """Get the allocation counter in place, which starts the program anew, and only then import torch."""
    try:
        load_malloc_counter({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    except RuntimeError as error:
        print(f"offload.py: {error}", file=sys.stderr)
        return 2
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Do what the options ask for; the exit status is 1 if a peer fails or the losses part."""
    from command import import_for_ranks
    from comparison import Entry, Settings, Spread, compare, loss_difference
    from models import SHAPES, Shape
    from network import enter_private_network
    from peers import PEERS
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from scaling import measure_slopes

    parser = argparse.ArgumentParser(prog="offload.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", type=Shape.parse, default=SHAPES["small"], help=f"{', '.join(SHAPES)}; default: small"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it run?")
    parser.add_argument("--path", default="/var/tmp", help="a directory on the disk; default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each; default: 5")
    options = parser.parse_args(arguments)
    shape, rounds = (SHAPES["tiny"], 2) if options.quick else (options.model, options.rounds)
    settings = Settings(options.ranks, rounds, 1, 600, enter_private_network())
    in_memory = PEERS["zgraph-3"]
    on_disk = partial(in_memory.build, offload={"optimizer": "disk"}, offload_path=options.path)
    entries = [Entry("in memory", in_memory), Entry("on disk", replace(in_memory, build=on_disk))]
    import_for_ranks(entries)
    before, after = compare(entries, shape, settings)
    slopes = [] if options.quick else measure_slopes(entries, SHAPES["narrow"], settings)
    problems = [f"{each.name}: {each.problem}" for each in (before, after, *slopes) if each.problem is not None]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1

    num_bytes = 2 * 4 * shape.num_parameters // options.ranks  # two moments in float32, divided
    disk_s = statistics.median(time_disk(options.path, options.ranks, num_bytes) for _ in range(ROUNDS))
    table = Table("", "step s", "/ memory", "/ bound", "live peak MB", "resident peak MB", box=box.SIMPLE_HEAD)
    for result in (before, after):
        ratio = Spread.of_pairs(result.step_s, before.step_s)
        bounds = [max(step_s, disk_s) for step_s in before.step_s]
        bound = Spread.of_pairs(result.step_s, bounds) if result is after else None
        table.add_row(
            result.name,
            f"{statistics.median(result.step_s):.3f}",
            f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})",
            "" if bound is None else f"{bound.median:.2f} ({bound.low:.2f}..{bound.high:.2f})",
            f"{result.live_peak_bytes / 1e6:.1f}",
            f"{result.resident_peak_bytes / 1e6:.1f}",
        )
    rate = options.ranks * num_bytes / disk_s / 1e9
    console = Console(width=None if os.isatty(1) else 160)
    console.print(
        f"GPT {shape} ({shape.num_parameters / 1e6:.1f}M parameters), {options.ranks} gloo ranks, AdamW", table
    )
    console.print(
        f"{num_bytes / 1e6:.1f} MB of state on each rank, read and written in each step: the disk alone takes "
        f"{disk_s:.3f} s, {rate:.2f} GB/s each way"
    )
    for slope in slopes:
        figures = ("live_peak_bytes", "resident_peak_bytes", "live_bytes")
        live, resident, kept = (slope.per_parameter(figure) for figure in figures)
        console.print(
            f"{slope.name}: {live:.2f} bytes per parameter and rank at the live peak, {resident:.2f} at the resident "
            f"one, {kept:.2f} between steps"
        )
    difference = loss_difference(after.losses, before.losses)
    if difference:
        print(f"the losses differ by {difference:.1e}", file=sys.stderr)
    return 1 if difference else 0


def time_disk(path: str, num_ranks: int, num_bytes: int) -> float:
    """Seconds in which all ranks at once read and write so many bytes each, both ways at a time."""
    context = get_context("fork")
    ready, go = context.Barrier(num_ranks + 1), context.Barrier(num_ranks + 1)
    processes = [context.Process(target=_move, args=(path, num_bytes, ready, go)) for _ in range(num_ranks)]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    go.wait()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"moving bytes ended with exit code {process.exitcode}")
    return time.perf_counter() - start


def _move(path: str, num_bytes: int, ready: object, go: object) -> None:
    import torch

    from zgraph.disk import PAGE, Disk

    disk = Disk(path)
    sizes = [BLOCK] * (num_bytes // BLOCK) + ([num_bytes % BLOCK] if num_bytes % BLOCK else [])
    disk.reserve(num_bytes)
    tensors = [disk.allocate(size, torch.uint8) for size in sizes]
    memory = torch.zeros(2 * BLOCK + PAGE, dtype=torch.uint8)
    source, target = memory[-memory.data_ptr() % PAGE :][: 2 * BLOCK].split(
        BLOCK
    )  # as in an arena, they begin at a page
    for tensor, size in zip(tensors, sizes, strict=True):
        tensor.write(source[:size])
    ready.wait()  # type: ignore[attr-defined]
    go.wait()  # type: ignore[attr-defined]
    storing = None
    for tensor, size in zip(tensors, sizes, strict=True):
        loading = tensor.load(target[:size])
        if storing is not None:
            storing.wait()
        loading.wait()
        storing = tensor.store(source[:size])
    if storing is not None:
        storing.wait()
    disk.check()


if __name__ == "__main__":
    sys.exit(main())
