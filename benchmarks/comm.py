"""zgraph's collectives on a CPU beside gloo's own: time and memory of each, where results lie in memory in use.

    python benchmarks/comm.py            two ranks, 4 KiB to 64 MiB

The reason why zgraph has ways of its own: reads of the peers' memory (``zgraph.direct``), and transfers between pairs
of ranks (``zgraph.comm``). Each row is the median of interleaved rounds, and the most live bytes during the call as a
multiple of the full tensor.
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
SIZES_MIB = (1 / 256, 0.25, 1, 4, 16, 64)
OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce")


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


def call(name: str, comm: Comm, full: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """One operation, from start to arrival."""
    if name == "all_gather":
        return comm.wait(comm.all_gather(comm.shard(full), out))
    if name == "reduce_scatter":
        return comm.wait(comm.reduce_scatter(full, "sum"))
    return comm.wait(comm.all_reduce(full, "sum"))


def compare() -> None:
    """On every rank: time each operation in all ways, and print a table on rank 0.

    Raises:
        RuntimeError: the ranks cannot read each other's memory here.
    """
    import torch
    import torch.distributed as dist

    from zgraph.comm import FunctionalComm, PointToPointComm
    from zgraph.direct import DirectComm
    from zgraph.peer_memory import find_readable_peers

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    pids = find_readable_peers(group)
    if pids is None:
        raise RuntimeError("the ranks cannot read each other's memory here (ptrace, seccomp)")
    ways: dict[str, Comm] = {
        "direct": DirectComm(group, pids),
        "pairs": PointToPointComm(group),
        "gloo": FunctionalComm(group),
    }
    if dist.get_rank() == 0:
        print(f"{'operation':16} {'MiB':>7}" + "".join(f" {way + ' ms':>10}" for way in ways) + "  memory of each")
    for mib in SIZES_MIB:
        full = torch.randn(int(mib * 2**20) // 4)
        out = torch.ones_like(full)
        for name in OPERATIONS:
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            held: dict[str, int] = dict.fromkeys(ways, 0)
            for _ in range(ROUNDS):
                for way, comm in ways.items():
                    dist.barrier()
                    meter = Meter()
                    start = time.perf_counter()
                    call(name, comm, full, out)
                    seconds[way].append(time.perf_counter() - start)
                    held[way] = max(held[way], meter.read().live_peak_bytes)
            if dist.get_rank() == 0:
                times = "".join(f" {statistics.median(seconds[way]) * 1e3:10.2f}" for way in ways)
                memory = ", ".join(f"{held[way] / full.nbytes:.2f}x" for way in ways)
                print(f"{name:16} {mib:7.4g}{times}  {memory}")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
