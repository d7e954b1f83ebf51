"""zgraph's kernels on a GPU beside what PyTorch and Inductor launch there; medians, the cache emptied before each call.

    python benchmarks/gpu_kernels.py                     all of the below
    python benchmarks/gpu_kernels.py --what update       AdamW of 128M parameters, beside a copy of as many bytes
    python benchmarks/gpu_kernels.py --what eight-bits   vectors to 8 bits an element and back
    python benchmarks/gpu_kernels.py --what regions      each region of a GPT's forward and backward
    python benchmarks/gpu_kernels.py --what loss         what losses hold of memory beyond the number that they return

An update reads four vectors and writes three. A region reads and writes what its table says, each vector once. ``--what
loss`` compares what is held with what is predicted, byte by byte.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable

import torch
from kernels import eight_bit_turns, stem, stepped, update_of, updates, ways_to_run
from models import Shape
from triton.testing import do_bench

import zgraph
from zgraph.codegen.kernel import TRITON
from zgraph.codegen.region import Region
from zgraph.scratch import kept_bytes

GPT = Shape(width=2048, layers=2, heads=16, tokens=1024, vocabulary=50304, sequences=4)


def seconds(call: Callable[[], object]) -> float:
    """The median of as many calls as fit into 60 ms."""
    return float(do_bench(call, warmup=10, rep=60, return_mode="median")) / 1e3


def compare_updates(numel: int) -> None:
    """Print how fast a bucket's update is, and PyTorch's own."""
    source, copied = torch.rand(numel * 7 // 2, device="cuda"), torch.empty(numel * 7 // 2, device="cuda")
    turns: dict[str, Callable[[], object]] = {"a copy of as many bytes": lambda: copied.copy_(source)}
    turns |= updates(update_of(numel, "cuda"), numel, "cuda")
    print(f"| AdamW, {numel:,} parameters | median | GB/s | of the copy |\n| --- | --- | --- | --- |")
    floor = 0.0
    for name, call in turns.items():
        took = seconds(call)
        floor = floor or took
        print(f"| {name} | {took * 1e3:.3f} ms | {28 * numel / took / 1e9:.0f} | {took / floor:.2f} |", flush=True)


def compare_eight_bits(numel: int) -> None:
    """Print how long vectors of so many elements take to 8 bits an element and back."""
    print("| vectors | ATen's calls | in one pass | of them |\n| --- | --- | --- | --- |")
    for name, (calls, one_pass) in eight_bit_turns(numel, "cuda").items():
        took, ours = seconds(calls), seconds(one_pass)
        print(f"| {name} | {took * 1e3:.3f} ms | {ours * 1e3:.3f} ms | {ours / took:.2f} |", flush=True)


def compare_regions(shape: Shape, with_inductor: bool) -> None:
    """Print the median time of each kind of region, of the calls that it replaces, and of Inductor's."""
    model = stepped(shape, "zgraph", "cuda", precision="bf16")
    moved = {each.name: each.read_bytes + each.written_bytes for each in model.kernels()}
    regions = [node.target for node in model.program.graph.nodes if isinstance(node.target, Region)]
    print("| region | times | bytes moved | ATen's calls | zgraph | Inductor |\n" + "| --- " * 6 + "|")
    for region, num in Counter(each for each in regions if each.device_type == "cuda").items():
        turns = ways_to_run(region, TRITON, with_inductor=with_inductor)
        took = {name: seconds(call) for name, call in turns.items()}
        num_bytes = moved[region.name]
        cells = [f"{s * 1e6:.0f} us, {num_bytes / s / 1e9:.0f} GB/s" for s in took.values()]
        print(f"| {stem(region.name)} | {num} | {num_bytes / 2**20:.1f} MiB | {' | '.join(cells)} |", flush=True)


LOSSES = {
    "mse_loss": torch.nn.functional.mse_loss,
    "smooth_l1_loss": torch.nn.functional.smooth_l1_loss,
    "huber_loss": torch.nn.functional.huber_loss,
    "l1_loss": torch.nn.functional.l1_loss,
    "soft_margin_loss": torch.nn.functional.soft_margin_loss,
    "binary_cross_entropy": lambda x, y: torch.nn.functional.binary_cross_entropy(x.sigmoid(), y.sigmoid()),
    "binary_cross_entropy_with_logits": torch.nn.functional.binary_cross_entropy_with_logits,
}


def compare_losses(numel: int) -> None:
    """Print what is held once a loss has been returned, and its operands are gone, and what is predicted to be."""
    print("| loss | held | predicted |\n| --- | --- | --- |")
    for name, function in LOSSES.items():
        x, y = (torch.rand(numel, device="cuda") for _ in range(2))
        before = torch.cuda.memory_allocated()
        loss = function(x, y)
        held = torch.cuda.memory_allocated() - before
        del loss
        model = torch.nn.PReLU(device="cuda")
        zgraph.compile(model, torch.optim.SGD(model.parameters()), loss=function)
        model.train_step(x)  # type: ignore[attr-defined]
        predicted = sum(kept_bytes(node) for node in model.program.graph.nodes)  # type: ignore[attr-defined]
        print(f"| {name} | {held:,} | {predicted:,} |", flush=True)


def main() -> int:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables: dict[str, Callable[[argparse.Namespace], None]] = {
        "update": lambda options: compare_updates(options.numel),
        "eight-bits": lambda options: compare_eight_bits(options.numel),
        "loss": lambda options: compare_losses(options.numel // 16),
        "regions": lambda options: compare_regions(options.shape, not options.no_inductor),
    }
    parser.add_argument("--what", choices=tables, nargs="+", default=list(tables), help="(default: all)")
    parser.add_argument("--numel", type=int, default=2**27, help="parameters, or elements (default: 134,217,728)")
    parser.add_argument("--shape", type=Shape.parse, default=GPT, help="of the GPT whose regions are compared")
    parser.add_argument("--no-inductor", action="store_true", help="leave it out, which compiles for minutes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels.py: there is no GPU here; benchmarks/kernels.py compares on a CPU", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in options.what:
        tables[name](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
