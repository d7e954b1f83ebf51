"""State and activations on a disk: what they cost in time and save in memory, beside the disk's own pace in this run.

    python benchmarks/offload.py                    the small GPT on two ranks
    python benchmarks/offload.py --model medium     the 135.6M GPT
    python benchmarks/offload.py --model 1024,4,16,16,512,1 --bucket-bytes 64MiB --nothing-ahead
                                                    few tokens, so that the disk has as much to do as the processors
    python benchmarks/offload.py --quick            a tiny one: does it run?
    python benchmarks/offload.py --cap 1GiB         the largest GPT that trains under a cap on each rank, beside peers'
    python benchmarks/offload.py --cap 1GiB --json FILE     and one JSON line for each peer, for trainable.py to draw

Peers take turns step by step, as in ``step.py``. Then the disk is measured: all ranks at once move as many bytes as a
step does, with nothing to compute meanwhile. A step with something on the disk can be no faster than the slower one of
the two; ``/ bound`` is how near it comes, and ``bound by`` which one that is. ``predicted s`` is by the machine's
calibration, and compares with ``step s`` only where nothing else runs. Where DeepSpeed is installed, and libaio for
what it compiles, its ZeRO-3 with the same on the same disk takes part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import BrokenBarrierError
from typing import TYPE_CHECKING

from memory import load_malloc_counter

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

    from comparison import Settings
    from models import Shape
    from torch import Tensor

    from zgraph.disk import DiskTensor, DiskTransfer

BLOCK = 2**24
ROUNDS = 3
DISK_TIMEOUT_S = 600
"""In which the disk has to move what a step moves."""

WAYS = {
    "activations on disk": ("activations",),
    "state on disk": ("optimizer",),
    "all state on disk": ("optimizer", "parameters"),
}

LIKE_DEEPSPEED = ("state on disk", "all state on disk")
"""What DeepSpeed can do, too."""

CAP_SHAPE = "1024,1,16,16,512,1"
"""Deepened under a cap: wide, so that it is parameters that take memory and not the graph of very many calls."""

CAP_BUCKET_BYTES = 4 * 2**20
ENOUGH = 10
"""Times the layers that plain PyTorch trains: no more are tried, since a step moves all of them over the disk."""


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
    from command import LOSS_TOLERANCE, import_for_ranks
    from comparison import Entry, Settings, Spread, compare, loss_difference
    from models import SHAPES, Shape
    from network import enter_private_network
    from peers import PEERS, deepspeed_on_disk
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from scaling import measure_slopes

    parser = argparse.ArgumentParser(prog="offload.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", type=Shape.parse, help=f"{', '.join(SHAPES)}; default: small, or with --cap {CAP_SHAPE}"
    )
    parser.add_argument("--cap", metavar="BYTES", help="find the largest model that trains under this cap per rank")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --cap: append one JSON line for each peer")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it run?")
    parser.add_argument("--path", default="/var/tmp", help="a directory on the disk; default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--bucket-bytes", metavar="BYTES", help="of zgraph with something on the disk")
    parser.add_argument(
        "--nothing-ahead", action="store_true", help="DeepSpeed reads and writes nothing ahead, as where it fails to"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each; default: 5")
    options = parser.parse_args(arguments)
    shape, rounds = (SHAPES["tiny"], 2) if options.quick else (options.model or SHAPES["small"], options.rounds)
    settings = Settings(options.ranks, rounds, 1, 600, enter_private_network())
    if options.cap is not None:
        shape = options.model or Shape.parse(CAP_SHAPE)
        return run_capped(options.cap, options.path, shape, replace(settings, rounds=1, timeout_s=1800), options.json)
    in_memory = PEERS["zgraph-3"]
    entries = [Entry("in memory", in_memory)]
    for name, what in WAYS.items():
        build = partial(in_memory.build, offload=dict.fromkeys(what, "disk"), offload_path=options.path)
        if options.bucket_bytes is not None:
            build = partial(build, bucket_bytes=options.bucket_bytes)
        entries.append(Entry(name, replace(in_memory, build=build)))
    with tempfile.TemporaryDirectory(prefix="zgraph-bench-", dir=options.path) as directory:
        theirs = {
            name: Entry(
                f"DeepSpeed, {name}",
                deepspeed_on_disk(f"{directory}/{index}", *WAYS[name], ahead=not options.nothing_ahead),
            )
            for index, name in enumerate(LIKE_DEEPSPEED)
        }
        if not prepare_deepspeed():
            theirs = {}
        import_for_ranks(entries)
        before, *others = compare([*entries, *theirs.values()], shape, settings)
    slopes = [] if options.quick else measure_slopes(entries, SHAPES["narrow"], settings)
    results = (before, *others)
    problems = [f"{each.name}: {each.problem}" for each in (*results, *slopes) if each.problem is not None]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1

    headings = ("step s", "/ memory", "disk alone s", "/ bound", "bound by", "predicted s", "off by")
    table = Table("", *headings, "live peak MB", "resident peak MB")
    table.box = box.SIMPLE_HEAD
    for result in results:
        ratio = Spread.of_pairs(result.step_s, before.step_s)
        cells, disk, median_s = ["", "", ""], result.disk, statistics.median(result.step_s)
        if disk.read_bytes + disk.written_bytes:
            moved = (disk.read_bytes, disk.written_bytes)
            disk_s = statistics.median(time_disk(options.path, options.ranks, *moved) for _ in range(ROUNDS))
            bound = Spread.of_pairs(result.step_s, [max(step_s, disk_s) for step_s in before.step_s])
            bound_by = "the disk" if disk_s > statistics.median(before.step_s) else "computing"
            cells = [f"{disk_s:.3f}", f"{bound.median:.2f} ({bound.low:.2f}..{bound.high:.2f})", bound_by]
        predicted = (
            [f"{disk.predicted_s:.3f}", f"{disk.predicted_s / median_s - 1:+.0%}"] if disk.predicted_s else ["", ""]
        )
        table.add_row(
            result.name,
            f"{median_s:.3f}",
            f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})",
            *cells,
            *predicted,
            f"{result.live_peak_bytes / 1e6:.1f}",
            f"{result.resident_peak_bytes / 1e6:.1f}",
        )
    console = Console(width=None if os.isatty(1) else 160)
    console.print(
        f"GPT {shape} ({shape.num_parameters / 1e6:.1f}M parameters), {options.ranks} gloo ranks, AdamW", table
    )
    by_name = {result.name: result for result in results}
    for name, entry in theirs.items():
        ratio = Spread.of_pairs(by_name[entry.name].step_s, by_name[name].step_s)
        console.print(f"{entry.name}: {ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f}) times as long as zgraph")
    for result in others[: len(WAYS)]:
        read, written = result.disk.read_bytes / 1e6, result.disk.written_bytes / 1e6
        console.print(f"{result.name}: each rank reads {read:.1f} MB in a step, and writes {written:.1f} MB")
    for slope in slopes:
        figures = ("live_peak_bytes", "resident_peak_bytes", "live_bytes")
        live, resident, kept = (slope.per_parameter(figure) for figure in figures)
        console.print(
            f"{slope.name}: {live:.2f} bytes per parameter and rank at the live peak, {resident:.2f} at the resident "
            f"one, {kept:.2f} between steps"
        )
    differ = False
    for result in others:
        difference = loss_difference(result.losses, before.losses)
        if not difference <= (LOSS_TOLERANCE if result.name.startswith("DeepSpeed") else 0.0):
            differ = True
            print(f"{result.name}: the losses differ by {difference:.1e}", file=sys.stderr)
    return 1 if differ else 0


def prepare_deepspeed() -> bool:
    """Import DeepSpeed, and have it compile what it moves bytes by, once for all ranks; False if it cannot."""
    from peers import deepspeed_on_disk

    missing = deepspeed_on_disk("").missing
    if missing is None:
        from deepspeed.ops.op_builder import AsyncIOBuilder  # type: ignore[import-not-found]

        builder = AsyncIOBuilder()
        if builder.is_compatible(verbose=False):
            builder.load(verbose=False)
        else:
            missing = "it finds no libaio to compile with: apt-get install libaio-dev"
    if missing is not None:
        print(f"DeepSpeed: skipped, {missing}", file=sys.stderr)
    return missing is None


def run_capped(cap: str, path: str, shape: Shape, settings: Settings, lines: Path | None) -> int:
    """The largest model of each peer under a cap; the exit status is 1 if one fails.

    Peers with everything on a disk are not asked for more than ``ENOUGH`` times the layers that plain PyTorch trains.
    """
    from cgroups import CapError, MemoryCap
    from command import describe_machine, import_for_ranks, report_reach
    from comparison import Entry
    from peers import PEERS, deepspeed_on_disk
    from rich.console import Console
    from scaling import find_reach

    from zgraph.config import parse_bytes

    cap_bytes = parse_bytes(cap, "--cap")
    try:
        MemoryCap(f"zgraph-bench-{os.getpid()}", cap_bytes).remove()
    except CapError as error:
        print(f"offload.py: {error}", file=sys.stderr)
        return 2
    on_disk = PEERS["zgraph-disk"]
    on_disk = replace(on_disk, build=partial(on_disk.build, offload_path=path, bucket_bytes=CAP_BUCKET_BYTES))
    alone = replace(on_disk, whole_batch=True)
    with tempfile.TemporaryDirectory(prefix="zgraph-bench-", dir=path) as directory:
        entries = [Entry(name, PEERS[name]) for name in ("single", "fsdp2-meta-tuned", "zgraph-3")]
        if prepare_deepspeed():
            both = deepspeed_on_disk(directory, "optimizer", "parameters", ahead=False)
            entries.append(Entry("DeepSpeed, all on disk", both))
        import_for_ranks(entries)
        reaches = [find_reach(entry, shape, settings, cap_bytes, layers_step=1) for entry in entries]
    first = ENOUGH * max(reaches[0].layers, 1)
    for name, peer in (("zgraph-disk, one rank", alone), ("zgraph-disk", on_disk)):
        entry = Entry(name, peer)
        reaches += [find_reach(entry, shape, settings, cap_bytes, layers_step=1, first=first, is_enough=True)]
    table, rows, complaints = report_reach(reaches, cap_bytes)
    Console(width=None if os.isatty(1) else 160).print(f"GPT {shape}, deepened", table, *complaints, sep="\n")
    if lines is not None:
        common = {"mode": "cap", "shape": asdict(shape), "settings": asdict(settings), "machine": describe_machine()}
        with lines.open("a") as file:
            file.writelines(json.dumps({**common, **row}) + "\n" for row in rows)
    return 1 if complaints else 0


def time_disk(path: str, num_ranks: int, read_bytes: int, written_bytes: int) -> float:
    """Seconds in which all ranks at once read and write so many bytes each, both at a time; no less are read."""
    context = get_context("fork")
    ready, go, done = (context.Barrier(num_ranks + 1) for _ in range(3))
    processes = [
        context.Process(target=_move, args=(path, read_bytes, written_bytes, (ready, go, done)))
        for _ in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        ready.wait(DISK_TIMEOUT_S)
        start = time.perf_counter()
        go.wait(DISK_TIMEOUT_S)
        done.wait(DISK_TIMEOUT_S)
        return time.perf_counter() - start
    except BrokenBarrierError:
        raise RuntimeError("moving bytes with nothing to compute failed") from None
    finally:
        for process in processes:
            process.join()


def _move(path: str, read_bytes: int, written_bytes: int, barriers: tuple[Barrier, Barrier, Barrier]) -> None:
    """Read so much, and write no more than that, two transfers of a ``BLOCK`` each way on their way."""
    import torch

    from zgraph.disk import Disk
    from zgraph.tiers import PAGE

    ready, go, done = barriers
    try:
        assert written_bytes <= read_bytes, "what is written is what was read"
        disk = Disk(path)
        sizes = [BLOCK] * (read_bytes // BLOCK) + ([read_bytes % BLOCK] if read_bytes % BLOCK else [])
        disk.reserve(read_bytes + PAGE * len(sizes))
        tensors = [disk.allocate(size, torch.uint8) for size in sizes]
        memory = torch.zeros(3 * BLOCK + PAGE, dtype=torch.uint8)
        in_pages = memory[-memory.data_ptr() % PAGE :][: 3 * BLOCK]  # as in an arena, they begin at a page
        source, *targets = in_pages.split(BLOCK)
        for tensor, size in zip(tensors, sizes, strict=True):
            tensor.write(source[:size])
        ready.wait(DISK_TIMEOUT_S)
        go.wait(DISK_TIMEOUT_S)
        loads: deque[tuple[DiskTransfer, DiskTensor, int]] = deque()
        stores: deque[DiskTransfer] = deque()
        for tensor, size in zip(tensors, sizes, strict=True):
            if len(loads) == len(targets):
                written_bytes -= _pass_on(loads, stores, source, written_bytes)
            loads.append((tensor.load(targets[0][:size]), tensor, size))
            targets.reverse()
        while loads:
            written_bytes -= _pass_on(loads, stores, source, written_bytes)
        while stores:
            stores.popleft().wait()
        disk.check()
        done.wait(DISK_TIMEOUT_S)
    except BaseException:
        for barrier in barriers:
            barrier.abort()
        raise


def _pass_on(
    loads: deque[tuple[DiskTransfer, DiskTensor, int]], stores: deque[DiskTransfer], source: Tensor, left: int
) -> int:
    """Wait for the first load, and write the same again if there are bytes left to write; how many it starts to."""
    loading, tensor, size = loads.popleft()
    loading.wait()
    if left <= 0:
        return 0
    if len(stores) == 2:
        stores.popleft().wait()
    stores.append(tensor.store(source[:size]))
    return size


if __name__ == "__main__":
    sys.exit(main())
