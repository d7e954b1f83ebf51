"""Calibrations of machines that do not exist, for tests."""

from __future__ import annotations

from zgraph.calibrate import CPU_SHAPES, GPU_SHAPES
from zgraph.calibration import Calibration, Run
from zgraph.curves import Matmul

LAUNCH_S = 2e-6
CPU_MATMUL = Matmul(1e11, 4, 4, 2e10, 1e-6, ramp_m=3.0, ramp_n=6.0, ramp_k=9.0, overlap=0.8, packed_per_s=1e10)
GPU_MATMUL = Matmul(5e14, 4, 4, 1e12, 4e-6, units=100, tile=128, quantisation=0.3, ramp_k=100.0, overlap=0.8)


def made_up(device_type: str = "cpu") -> Calibration:
    """A CPU of four cores, or two GPUs, whose every time follows a formula; twice as long with two ranks on a CPU."""
    cpu = device_type == "cpu"
    return Calibration(
        device_type=device_type,
        device="made up",
        devices=4 if cpu else 2,
        units=1 if cpu else 100,
        memory_bytes=2**34,
        host_memory_bytes=2**34,
        torch="2.13.0",
        seconds=12.5,
        runs={1: _run(cpu, 1, 1.0), 2: _run(cpu, 2, 2.0 if cpu else 1.0)},
    )


def _run(cpu: bool, ranks: int, slower: float) -> Run:
    launch_s = LAUNCH_S if cpu else 0.0
    matmul = CPU_MATMUL.scaled(slower) if cpu else GPU_MATMUL
    shapes = CPU_SHAPES if cpu else GPU_SHAPES

    def line(per_second: float, *sizes: int) -> list[list[float]]:
        return [[size, launch_s + size / per_second * slower] for size in sizes]

    products: list[list[float]] = [[*shape, launch_s + matmul.seconds(*shape)] for shape in shapes]
    collectives = ("all_gather", "reduce_scatter", "all_reduce") if ranks > 1 else ()
    return Run(
        threads=4 // ranks,
        launch_s=LAUNCH_S,
        matmul=dict.fromkeys(("float32", "bfloat16", "float16", "float64"), products),
        memory=line(4e9, 2**13, 2**20, 2**27),
        memory_in_place=line(1e10, 2**13, 2**20, 2**27),
        vector={dtype: line(1e10, 2**11, 2**17) for dtype in ("float32", "bfloat16", "float16", "float64")},
        transcendental=line(1e9, 2**12, 2**20),
        gather=line(3e9, 2**15, 2**25),
        attention={dtype: line(5e10, 2**21, 2**29) for dtype in ("float32", "bfloat16")},
        collectives={kind: line(1e9, 2**12, 2**26) for kind in collectives},
        loops={"operations": line(2e10, 2**12, 2**20), "functions": line(1e9, 2**12, 2**20)} if cpu else {},
        host_link={} if cpu else {"pinned": line(2e10, 2**12, 2**26), "pageable": line(1e10, 2**12, 2**26)},
        host_memory=[] if cpu or ranks > 1 else line(6e10, 2**24, 2**28),
        disk={"read": line(2e9, 2**12, 2**26), "write": line(1e9, 2**12, 2**26)} if ranks == 1 else {},
    )
