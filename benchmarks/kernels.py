"""zgraph's kernels on this CPU beside those of others; all take turns in every round, and tables have medians.

    python benchmarks/kernels.py                      the update of 20M parameters by AdamW, one thread and all cores
    python benchmarks/kernels.py --numel 5000000 --rounds 20
    python benchmarks/kernels.py --step small         a whole step of a GPT, one thread and all cores
    python benchmarks/kernels.py --regions small      each region of forward and backward beside ATen's and Inductor's
    python benchmarks/kernels.py --compile small      how long a GPT compiles, with and without what caches keep
    python benchmarks/kernels.py --eight-bits         vectors to 8 bits an element and back, beside ATen's calls
    python benchmarks/kernels.py --loss               the gradient of a loss's logits, beside the two calls it replaces
    python benchmarks/kernels.py --count              bytes and launches of steps of one block; nothing runs

Beside the update runs a loop that reads four vectors and writes three, as the update does: an update in one pass can be
as fast, and no faster than noise makes it. ``--regions`` has the ratio that ``kernels="auto"`` goes by, too.
``--count`` leaves out matrix products, convolutions, attention and what lies in place, and has what Inductor makes of
the same captured step beside zgraph's.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import inductor
import torch
from models import GPT, SHAPES, Shape, VisionTransformer, build_batch, build_model
from torch import fx

import zgraph
from zgraph import packed, quantized
from zgraph.capture import capture
from zgraph.codegen import quantizers
from zgraph.codegen.inductor import InductorRegion
from zgraph.codegen.inductor import can_write as inductor_can_write
from zgraph.codegen.kernel import CPP, INDUCTOR, SLICES, Kernel
from zgraph.codegen.library import load
from zgraph.codegen.region import Region
from zgraph.config import Config
from zgraph.into import into
from zgraph.lower import lower
from zgraph.machines import available_cores
from zgraph.packed import BLOCK
from zgraph.placement import place
from zgraph.presets import Decoder, ModelConfig
from zgraph.program import Mesh, Program
from zgraph.work import ATTENTION, LOOKUP, MATRIX, VECTOR, works

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


def update_of(numel: int, device: str = "cpu") -> Kernel:
    """The kernel that updates a bucket of so many elements, or a few more."""
    width = max(int(numel**0.5), 1)
    model = torch.nn.Linear(width, width, bias=False, device=device)
    zgraph.compile(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        loss=lambda y, _: y.square().mean(),
        bucket_bytes=8 * numel,
    )
    for _ in range(2):
        model.train_step(torch.ones(1, width, device=device))
    (kernel,) = (node.target for node in model.program.graph.nodes if isinstance(node.target, Kernel))
    return kernel  # type: ignore[no-any-return]


def contenders(kernel: Kernel, numel: int) -> dict[str, Callable[[], object]]:
    """What takes turns on a CPU."""
    stream = load(STREAM).stream
    moved = [torch.rand(numel) for _ in range(4)]

    def move() -> None:
        addresses = (ctypes.c_void_p(vector.data_ptr()) for vector in moved)
        stream(ctypes.c_long(numel), torch.get_num_threads(), *addresses)

    return {"loop that only moves": move, **updates(kernel, numel, "cpu")}


def updates(kernel: Kernel, numel: int, device: str) -> dict[str, Callable[[], object]]:
    """Ways to update a bucket, each on vectors of its own."""

    def vectors() -> list[torch.Tensor]:
        return [torch.rand(numel, device=device) for _ in range(4)]

    def inputs() -> list[object]:
        flat = iter(vectors())
        placeholders = kernel.body.find_nodes(op="placeholder")
        return [next(flat) if isinstance(node.meta["val"], torch.Tensor) else 0.9 for node in placeholders]

    p, g, m, v = vectors()
    step = torch.tensor(1.0, device=device)
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
    compiled, sliced = inputs(), inputs()
    in_slices = kernel._function(SLICES)
    return {
        f"zgraph, {kernel.runs_in(device)}": lambda: kernel(*compiled),
        "zgraph, kernels='eager'": lambda: in_slices(*sliced),
        "torch, fused=True": lambda: torch._fused_adamw_(
            [p], [g], [m], [v], [], [step], amsgrad=False, maximize=False, **options
        ),
    }


LOSSES = ((512, 32768), (512, 8192), (4096, 1000))
"""Rows and classes of logits."""

PRODUCTS = "its products and attention alone"

aten = torch.ops.aten

COMPILED = ("torch.compile", "zgraph", "zgraph, kernels='auto'")
"""Contenders in whole steps that compile something."""


def steps(shape: Shape, only: str | None = None) -> dict[str, Callable[[], object]]:
    """What takes turns: a training step of models of their own, which start alike; only one of them if so asked."""
    batch = build_batch(shape, 1, range(1))

    def plain(compiled: bool) -> Callable[[], object]:
        model = build_model(shape)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        forward = torch.compile(model) if compiled else model

        def step() -> None:
            forward(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def ours(kernels: str) -> Callable[[], object]:
        model = build_model(shape)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        zgraph.compile(model, optimizer, zero=0, kernels=kernels)
        return lambda: model.train_step(*batch)

    def products() -> Callable[[], object]:
        calls = products_of(stepped(shape, "update").program)
        return lambda: [call() for call in calls]

    made: dict[str, Callable[[], Callable[[], object]]] = {
        "PyTorch": partial(plain, compiled=False),
        "torch.compile": partial(plain, compiled=True),
        "zgraph": partial(ours, "update"),
        "zgraph, kernels='auto'": partial(ours, "auto"),
        PRODUCTS: products,
    }
    return {name: make() for name, make in made.items() if only in (None, name)}


def products_of(program: Program) -> list[Callable[[], object]]:
    """A program's matrix products and attention, which store their results where they are told to, if they can."""
    given: dict[object, Any] = {}
    made: dict[object, Any] = {}

    def value_of(node: fx.Node, among: dict[object, Any] = given) -> Any:
        val = node.meta["val"]
        form = (val.shape, val.stride(), val.dtype) if isinstance(val, torch.Tensor) else type(val)
        if form not in among:
            among[form] = value_for(val)
        return among[form]

    calls: list[Callable[[], object]] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or not {work.unit for work in works(node, 1)} & {MATRIX, ATTENTION}:
            continue
        call = into(node)
        target, args, kwargs = (node.target, node.args, node.kwargs) if call is None else (call.target, call.args, {})
        args, kwargs = fx.map_arg(args, value_of), fx.map_arg(dict(kwargs), value_of)
        out = {} if call is None else {**call.kwargs, call.out: value_of(node, made)}
        calls.append(partial(target, *args, **kwargs, **out))
    return calls


def compare_steps(shape: Shape, rounds: int) -> None:
    """Print medians of whole steps, and of their matrix products and attention alone."""
    print("| step | threads | median | of PyTorch's |\n| --- | --- | --- | --- |")
    for threads in sorted({1, available_cores()}):
        torch.set_num_threads(threads)
        seconds = take_turns(steps(shape), rounds)
        first, *_ = seconds.values()
        for name, median in seconds.items():
            print(f"| {name} | {threads} | {median * 1e3:.0f} ms | {median / first:.3f} |", flush=True)


def compare_compiling(shape: Shape) -> None:
    """Print how much longer first steps take: with empty caches, and in a new process with what they kept."""
    print("| compiling | caches | seconds | CPU seconds |\n| --- | --- | --- | --- |")
    for name in COMPILED:
        with tempfile.TemporaryDirectory() as caches:
            places = {"XDG_CACHE_HOME": caches, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
            for state in ("empty", "full"):
                command = [sys.executable, __file__, "--compile", str(shape), "--contender", name]
                done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=True)
                wall, cpu = map(float, done.stdout.split()[-2:])
                print(f"| {name} | {state} | {wall:.1f} | {cpu:.1f} |", flush=True)


def time_compiling(shape: Shape, name: str) -> None:
    """Print how many seconds a first step takes more than another, and of processors, children's included."""
    torch.set_num_threads(1)
    step = steps(shape, only=name)[name]
    took = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        step()
        took.append((time.perf_counter() - wall, sum(os.times()[:4]) - cpu))
    print(*(first - later for first, later in zip(*took, strict=True)))


def compare_losses(rounds: int, sizes: Sequence[tuple[int, int]] = LOSSES) -> None:
    """Print how long the gradients of logits take, of two calls and of one that goes a few rows at a time."""
    print("| logits | threads | two calls | one | of them |\n| --- | --- | --- | --- | --- |")
    for threads in sorted({1, available_cores()}):
        torch.set_num_threads(threads)
        for rows, classes in sizes:
            logs, target = torch.randn(rows, classes).log_softmax(1), torch.arange(rows) % classes
            given = (torch.tensor(1.0), logs, target, None, 1, -100, torch.tensor(float(rows)))
            of_loss, of_logs, over = torch.empty_like(logs), torch.empty_like(logs), logs.clone()

            def two_calls(given: Any = given, of_loss: Any = of_loss, of_logs: Any = of_logs) -> None:
                aten.nll_loss_backward.grad_input(*given, grad_input=of_loss)
                aten._log_softmax_backward_data.out(of_loss, given[1], 1, torch.float32, out=of_logs)

            # As in a step, over the logarithms: from the second round on these are other numbers, of the same size.
            one = partial(torch.ops.zgraph.cross_entropy_backward.out, given[0], over, *given[2:], 1, out=over)
            took = take_turns({"two": two_calls, "one": one}, rounds)
            figures = f"{took['two'] * 1e3:.1f} ms | {took['one'] * 1e3:.1f} ms | {took['one'] / took['two']:.2f}"
            print(f"| {rows} x {classes} | {threads} | {figures} |", flush=True)


def eight_bit_turns(numel: int, device: str) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Ways of vectors of so many elements to 8 bits an element and back: by calls of ATen, and in one pass."""
    x = torch.randn(numel // BLOCK * BLOCK, device=device)
    data, state = quantized.quantize(x), packed.pack(x)
    both = torch.cat([data, data])
    return {
        "quantize": (partial(quantized.quantize, x), partial(quantizers.quantize, x)),
        "dequantize": (partial(quantized.dequantize, data), partial(quantizers.dequantize, data)),
        "mean of two": (partial(quantized.mean_of_quantized, both, 2), partial(quantizers.mean_of_quantized, both, 2)),
        "pack": (partial(packed.pack, x), partial(quantizers.pack, x)),
        "unpack": (partial(packed.unpack, state), partial(quantizers.unpack, state)),
    }


def compare_eight_bits(numel: int, rounds: int) -> None:
    """Print how long vectors of so many elements take to 8 bits an element and back."""
    turns = eight_bit_turns(numel, "cpu")
    print("| vectors | threads | ATen's calls | in one pass | of them |\n| --- | --- | --- | --- | --- |")
    for threads in sorted({1, available_cores()}):
        torch.set_num_threads(threads)
        for name, (calls, one_pass) in turns.items():
            took = take_turns({"calls": calls, "ours": one_pass}, rounds)
            figures = f"{took['calls'] * 1e3:.1f} ms | {took['ours'] * 1e3:.1f} ms | {took['ours'] / took['calls']:.2f}"
            print(f"| {name} | {threads} | {figures} |", flush=True)


def compare_regions(shape: Shape, rounds: int) -> None:
    """Print the median time of each kind of region, of the calls that it replaces, and of what Inductor makes of them.

    Those that zgraph has words for come first, and then those that are left to Inductor.
    """
    print("| region | threads | times | ATen's calls | zgraph | Inductor | predicted |\n" + "| --- " * 7 + "|")
    for threads in sorted({1, available_cores()}):
        torch.set_num_threads(threads)
        own, others = stepped(shape, "zgraph"), stepped(shape, "auto")
        weighed = others.program.weighed
        predicted = {
            stem(each.name): each.kernel_s / each.calls_s for each in weighed if each.kernel_s and each.calls_s
        }
        nodes = [node.target for node in own.program.graph.nodes if isinstance(node.target, Region)]
        nodes += [node.target for node in others.program.graph.nodes if isinstance(node.target, InductorRegion)]
        for region, num in Counter(nodes).items():
            took = take_turns(ways_to_run(region, CPP), rounds)
            ratio = {name: f"{s * 1e6:.0f} us, {s / took['calls']:.2f}" for name, s in took.items()}
            figures = f"{took['calls'] * 1e6:.0f} us | {ratio.get('ours', '')} | {ratio.get('Inductor', '')}"
            foretold = predicted.get(stem(region.name))
            told = "" if foretold is None else f"{foretold:.2f}"
            print(f"| {region.name} | {threads} | {num} | {figures} | {told} |", flush=True)


def ways_to_run(region: Region, language: str, *, with_inductor: bool = True) -> dict[str, Callable[[], object]]:
    """A region's calls, its kernel in a language if zgraph has words for it, and what Inductor makes of it."""
    values = [value_for(node.meta["val"]) for node in region.body.find_nodes(op="placeholder")]
    turns: dict[str, Callable[[], object]] = {"calls": partial(region._function(SLICES), *values)}
    if not isinstance(region, InductorRegion):
        turns["ours"] = partial(region._function(language), *values)
    if with_inductor and inductor_can_write(region.body, region.device_type):
        made = InductorRegion(region.name, region.body, region.num_inputs, region.writes, is_compiled=True)
        turns["Inductor"] = partial(made._function(INDUCTOR), *values)
    return turns


def stepped(shape: Shape, kernels: str, device: str = "cpu", **options: Any) -> Any:
    """A GPT after a step."""
    model = build_model(shape, device)
    zgraph.compile(model, torch.optim.AdamW(model.parameters()), zero=0, kernels=kernels, **options)
    model.train_step(*(each.to(device) for each in build_batch(shape, 1, range(1))))
    return model


def stem(name: str) -> str:
    """The name of a region without its number."""
    return name.rstrip("0123456789").rstrip("_")


def value_for(val: Any) -> Any:
    """Something to compute with, in the form of a value."""
    if not isinstance(val, torch.Tensor):
        return 1.0
    if not val.dtype.is_floating_point:
        return torch.zeros(val.shape, dtype=val.dtype, device=val.device)
    like = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    numbers = torch.rand(like.untyped_storage().nbytes() // like.itemsize, device=val.device)
    return numbers.to(val.dtype).as_strided(val.shape, val.stride())


def blocks() -> dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]:
    """Models of one block of width 1024 with a batch each, on meta: a GPT, a Llama, and a vision transformer."""
    shape = Shape(width=1024, layers=1, heads=16, tokens=1024, vocabulary=32000, sequences=4)
    llama = ModelConfig("llama", 1, 1024, 16, 4, 2816, shape.vocabulary, shape.tokens)
    with torch.device("meta"):
        tokens = torch.zeros(shape.sequences, shape.tokens, dtype=torch.int64)
        images, classes = torch.zeros(16, 3, 224, 224), torch.zeros(16, dtype=torch.int64)
        return {
            "GPT": (GPT(shape), (tokens, tokens)),
            "Llama": (Decoder(llama), (tokens, tokens)),
            "ViT": (VisionTransformer(width=1024, layers=1, heads=16), (images, classes)),
        }


def count() -> None:
    """Print what a step of one block moves and starts."""
    print("| a step of one block, in float32 | kernels | launches | MB |\n| --- | --- | --- | --- |")
    for name, (model, batch) in blocks().items():
        optimizer = torch.optim.AdamW(model.parameters())
        for clip_norm in (None, 1.0):
            title = f"{name}, clip_norm=1.0" if clip_norm else name
            asked = Config.from_options({"zero": 0, "clip_norm": clip_norm})
            captured = capture(model, optimizer, batch, {}, config=asked)
            for kernels in ("update", "zgraph"):
                config = replace(asked, kernels=kernels)
                launches, moved = counted(lower(captured, config, Mesh(1), None, (), prove=False).last)
                print(f"| {title} | {kernels} | {launches} | {moved / 1e6:,.0f} |")
            launches, moved = inductor.count(captured)
            print(f"| {title} | Inductor's | {launches} | {moved / 1e6:,.0f} |")


def counted(program: Program) -> tuple[int, int]:
    """Launches of a step and the bytes that they move."""
    made = [
        work
        for node in program.graph.nodes
        if node.op == "call_function" and node.target is not torch.ops.aten.cat.default
        for work in works(node, 1)
        if work.unit in (VECTOR, LOOKUP)
    ]
    return len(made), sum(work.num_bytes for work in made) + 2 * place(program).copied_bytes


def take_turns(turns: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each one's seconds, after a round for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for round_number in range(rounds + 1):
        for name, work in turns.items():
            start = time.perf_counter()
            work()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=20_000_000, help="parameters, or elements (default: 20,000,000)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: 9)")
    parser.add_argument("--step", type=Shape.parse, help=f"time steps of a GPT: {', '.join(SHAPES)}, or six integers")
    parser.add_argument("--regions", type=Shape.parse, help="time regions of a GPT: names or integers as of --step")
    parser.add_argument("--compile", type=Shape.parse, help="time compiling a GPT: names or integers as of --step")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--eight-bits", action="store_true", help="time vectors to 8 bits an element and back")
    parser.add_argument("--loss", action="store_true", help="time the gradient of a loss's logits")
    parser.add_argument("--count", action="store_true", help="count what a step of one block moves and starts")
    options = parser.parse_args()
    if options.count:
        count()
        return 0
    if options.compile is not None:
        time_compiling(options.compile, options.contender) if options.contender else compare_compiling(options.compile)
        return 0
    if options.regions is not None:
        compare_regions(options.regions, options.rounds)
        return 0
    if options.loss:
        compare_losses(options.rounds)
        return 0
    if options.eight_bits:
        compare_eight_bits(options.numel, options.rounds)
        return 0
    if options.step is not None:
        compare_steps(options.step, options.rounds)
        return 0
    kernel = update_of(options.numel)
    print(f"| {options.numel:,} parameters | threads | median | GB/s | of the loop |\n| --- | --- | --- | --- | --- |")
    for threads in sorted({1, available_cores()}):
        torch.set_num_threads(threads)
        turns = contenders(kernel, options.numel)
        medians = take_turns(turns, options.rounds)
        floor, *_ = medians.values()
        for name, middle in medians.items():
            rate = 28 * options.numel / middle / 1e9
            print(f"| {name} | {threads} | {middle * 1e3:.1f} ms | {rate:.1f} | {middle / floor:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
