"""The update of one bucket by AdamW on this CPU: zgraph's kernel beside ATen's, and beside a loop that moves bytes.

    python benchmarks/kernels.py                      20M parameters, one thread and all cores
    python benchmarks/kernels.py --numel 5000000 --rounds 20

All take turns in every round; the table has medians. The loop reads four vectors and writes three, as the update does:
an update in one pass can be as fast, and no faster than noise makes it.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable

import torch

import zgraph
from zgraph.codegen.kernel import SLICES, Kernel
from zgraph.codegen.library import load
from zgraph.machines import available_cores

STREAM = """extern "C" void stream(long n, int threads, float *p, float *g, float *m, float *v) {
    #pragma omp parallel for simd num_threads(threads) if (parallel: threads > 1)
    for (long i = 0; i < n; i++) {
        const float sum = p[i] + g[i] + m[i] + v[i];
        p[i] = sum;
        m[i] = sum;
        v[i] = sum;
    }
}
"""


def update_of(numel: int) -> Kernel:
    """The kernel that updates a bucket of so many elements, or a few more."""
    width = max(int(numel**0.5), 1)
    model = torch.nn.Linear(width, width, bias=False)
    zgraph.compile(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        loss=lambda y, _: y.square().mean(),
        bucket_bytes=8 * numel,
    )
    for _ in range(2):
        model.train_step(torch.ones(1, width))
    (kernel,) = (node.target for node in model.program.graph.nodes if isinstance(node.target, Kernel))
    return kernel  # type: ignore[no-any-return]


def contenders(kernel: Kernel, numel: int) -> dict[str, Callable[[], object]]:
    """What takes turns, each on vectors of its own."""

    def vectors() -> list[torch.Tensor]:
        return [torch.rand(numel) for _ in range(4)]

    def inputs() -> list[object]:
        flat = iter(vectors())
        placeholders = kernel.body.find_nodes(op="placeholder")
        return [next(flat) if isinstance(node.meta["val"], torch.Tensor) else 0.9 for node in placeholders]

    stream = load(STREAM).stream
    p, g, m, v = vectors()
    moved = vectors()
    step = torch.tensor(1.0)
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
    compiled, sliced = inputs(), inputs()
    in_slices = kernel._function(SLICES)

    def move() -> None:
        addresses = (ctypes.c_void_p(vector.data_ptr()) for vector in moved)
        stream(ctypes.c_long(numel), torch.get_num_threads(), *addresses)

    return {
        "loop that only moves": move,
        f"zgraph, {kernel.runs_in('cpu')}": lambda: kernel(*compiled),
        "zgraph, kernels='eager'": lambda: in_slices(*sliced),
        "torch, fused=True": lambda: torch._fused_adamw_(
            [p], [g], [m], [v], [], [step], amsgrad=False, maximize=False, **options
        ),
    }


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=20_000_000, help="parameters (default: 20,000,000)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: 9)")
    options = parser.parse_args()
    kernel = update_of(options.numel)
    print(f"| {options.numel:,} parameters | threads | median | GB/s | of the loop |\n| --- | --- | --- | --- | --- |")
    for threads in sorted({1, available_cores()}):
        torch.set_num_threads(threads)
        works = contenders(kernel, options.numel)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for round_number in range(options.rounds + 1):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                if round_number:  # the first is for warming up
                    seconds[name].append(time.perf_counter() - start)
        floor, *_ = (statistics.median(each) for each in seconds.values())
        for name, each in seconds.items():
            middle = statistics.median(each)
            rate = 28 * options.numel / middle / 1e9
            print(f"| {name} | {threads} | {middle * 1e3:.1f} ms | {rate:.1f} | {middle / floor:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
