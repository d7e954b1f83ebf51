"""zgraph's gloo transfers beside gloo's own collectives: time and memory of one gather and one reduce-scatter.

    python benchmarks/comm.py            two ranks, 0.25 to 64 MiB

The reason why ``zgraph.comm`` has point-to-point transfers at all. Each row is the median of interleaved rounds, and
the most live bytes during the call as a multiple of the full tensor.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

from memory import Meter, load_malloc_counter

if TYPE_CHECKING:
    import torch

    from zgraph.comm import Comm

ROUNDS = 7
SIZES_MIB = (0.25, 1, 4, 16, 64)


def main() -> int:
    """Start the ranks; in each, get the allocation counter in place and measure."""
    if "RANK" not in os.environ:
        from torch.distributed.run import main as torchrun

        torchrun(["--standalone", "--nproc-per-node", "2", os.path.abspath(__file__)])
        return 0
    try:
        load_malloc_counter({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    except RuntimeError as error:
        print(f"comm.py: {error}", file=sys.stderr)
        return 2
    compare()
    return 0


def call(name: str, comm: Comm, full: torch.Tensor) -> torch.Tensor:
    """One operation, from start to arrival."""
    if name == "all_gather":
        return comm.wait(comm.all_gather(comm.shard(full)))
    return comm.wait(comm.reduce_scatter(full, "sum"))


def compare() -> None:
    """On every rank: time each operation both ways, and print a table on rank 0."""
    import torch
    import torch.distributed as dist

    from zgraph.comm import FunctionalComm, PointToPointComm

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    ways: dict[str, Comm] = {"zgraph": PointToPointComm(group), "gloo": FunctionalComm(group)}
    if dist.get_rank() == 0:
        print(f"{'operation':16} {'MiB':>6} {'zgraph ms':>10} {'gloo ms':>10} {'ratio':>6}  memory: zgraph, gloo")
    for mib in SIZES_MIB:
        full = torch.randn(int(mib * 2**20) // 4)
        for name in ("all_gather", "reduce_scatter"):
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            held: dict[str, int] = dict.fromkeys(ways, 0)
            for _ in range(ROUNDS):
                for way in ways:
                    dist.barrier()
                    meter = Meter()
                    start = time.perf_counter()
                    call(name, ways[way], full)
                    seconds[way].append(time.perf_counter() - start)
                    held[way] = max(held[way], meter.read().live_peak_bytes)
            if dist.get_rank() == 0:
                median = {way: statistics.median(values) for way, values in seconds.items()}
                print(
                    f"{name:16} {mib:6g} {median['zgraph'] * 1e3:10.2f} {median['gloo'] * 1e3:10.2f} "
                    f"{median['zgraph'] / median['gloo']:6.2f}  "
                    + ", ".join(f"{held[way] / full.nbytes:.2f}x" for way in ways)
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
