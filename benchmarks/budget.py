"""A budget, swept: what zgraph trains with in ever less memory, beside torch's own ways to spend less.

    python benchmarks/budget.py                                three models, ten budgets each, two ranks
    python benchmarks/budget.py --quick                        tiny ones, three budgets: does it run?
    python benchmarks/budget.py --markdown docs/budget.md      write the tables there
    python benchmarks/budget.py --inductor                     torch.compile with generated kernels, which take minutes

Budgets go from what the fastest choice takes down to what the smallest takes, and one below, which has to be refused.
Each is trained with in processes of its own; bytes are the largest that a rank allocated in a step above its imports,
and those that were resident (``benchmarks/memory.py``). Then steps take turns with PyTorch's own on each rank alone,
whose time is the unit: what else the machine does takes as much from both. The exit status is 1 if a step allocated
more than its budget, or if the predicted step got faster with less memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from memory import Meter, load_malloc_counter
from models import GPT, Shape, build_batch
from tables import write_between_marks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import zgraph

RANKS = 2
WARMUP, MEASURED = 2, 7
TORCH_BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.0)


class Mixer(nn.Module):
    """Blocks that mix tokens, then channels; called with targets, it returns their mean squared distance."""

    def __init__(self, width: int, tokens: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MixerBlock(width, tokens) for _ in range(layers))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Both of shape (batch, tokens, width)."""
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(self.head(x), targets)


class MixerBlock(nn.Module):
    """Two feed-forward layers over tokens and over channels, each normalised first and added to its input."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.over_channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (batch, tokens, width), to the same shape."""
        x = x + self.over_tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = x + self.over_channels(self.norms[1](x))
        return mixed


class ConvNet(nn.Module):
    """Residual convolutions at one resolution; called with classes, it returns their mean cross-entropy."""

    def __init__(self, channels: int, layers: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(channels) for _ in range(layers))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Images of shape (batch, 3, height, width), and (batch,) classes."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), classes)


class ConvBlock(nn.Module):
    """Two convolutions, each normalised and rectified first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (batch, channels, height, width), to the same shape."""
        inner = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            inner = convolution(F.relu(norm(inner)))
        added: Tensor = x + inner
        return added


@dataclass(frozen=True)
class Model:
    """What is trained: a builder, and what makes one rank's batch."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]


def _gpt(shape: Shape) -> Model:
    return Model(lambda: GPT(shape), lambda rank: build_batch(shape, RANKS, range(rank, rank + 1)))


def _random(*shapes: tuple[int, ...]) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(rank: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        x, y = (torch.randn(shape, generator=generator) for shape in shapes)
        return x, y

    return batch


def _images(rows: int, size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda rank: (_random((rows, 3, size, size), ())(rank)[0], torch.arange(rows) % 10)


MODELS = {
    "GPT, 7.5M": _gpt(Shape(width=256, layers=8, heads=4, tokens=128, vocabulary=2048, sequences=8)),
    "mixer, 5.4M": Model(lambda: Mixer(256, 128, 16), _random((8, 128, 256), (8, 128, 256))),
    "convolutions, 0.6M": Model(lambda: ConvNet(64, 8), _images(8, 32)),
}
QUICK_MODELS = {
    "GPT": _gpt(Shape(width=64, layers=2, heads=2, tokens=32, vocabulary=256, sequences=4)),
    "mixer": Model(lambda: Mixer(32, 16, 2), _random((4, 16, 32), (4, 16, 32))),
    "convolutions": Model(lambda: ConvNet(8, 2), _images(4, 8)),
}
ALL_MODELS = {**MODELS, **QUICK_MODELS}


@dataclass(frozen=True)
class Row:
    """One way to train one model.

    Attributes:
        model, way: their names.
        budget_bytes: that zgraph was given.
        predicted_bytes, predicted_s: of zgraph's plan.
        options: that zgraph chose.
        live_bytes: the most that a rank allocated in a step; None if it was refused.
        resident_bytes: the most that was resident of one.
        step_s: the median.
        alone_s: the median of PyTorch's own step on each rank alone, in turns with it.
        problem: why it did not train.
    """

    model: str
    way: str
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    predicted_s: float | None = None
    options: str = ""
    live_bytes: int | None = None
    resident_bytes: int | None = None
    step_s: float | None = None
    alone_s: float | None = None
    problem: str = ""


# One rank


def _training(name: str, way: str, rank: int) -> tuple[Callable[[], Tensor], Callable[[], zgraph.Plan | None]]:
    """A step, and what it was planned to take."""
    torch.manual_seed(0)
    model, batch = ALL_MODELS[name].build(), ALL_MODELS[name].batch(rank)
    kind, _, value = way.partition("=")
    if kind == "zgraph":
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        compiled = zgraph.compile(model, optimizer=optimizer, memory=int(value), accumulate="auto")
        return lambda: compiled.train_step(*batch), lambda: compiled.plan
    if kind == "fsdp2":
        for index, block in enumerate(model.blocks):  # type: ignore[arg-type, union-attr]
            wrapped = checkpoint_wrapper(block) if value == "checkpoint" else block
            model.blocks[index] = fully_shard(wrapped)  # type: ignore[index, operator]
        model = fully_shard(model)
    elif kind != "alone":
        torch._functorch.config.activation_memory_budget = float(value)
        model = DistributedDataParallel(model)
        model = torch.compile(model, backend=kind)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> Tensor:
        loss: Tensor = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, lambda: None


def serve(name: str, way: str, rank: int, store: str) -> None:
    """Train, and print what rank 0 knows of all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    tiny = ConvNet(4, 1)
    tiny(*_images(2, 4)(0)).backward()  # pages of code are in the baseline
    torch.optim.AdamW(tiny.parameters(), fused=True).step()
    gc.collect()
    meter = Meter()
    row: dict[str, Any] = {}
    try:
        step, plan_of = _training(name, way, rank)
        for _ in range(WARMUP):
            step()
        gc.collect()
        meter.restart_peaks()
        for _ in range(2):
            step().item()
        held = meter.read()
        most = torch.tensor([held.live_peak_bytes, held.resident_peak_bytes])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        live_bytes, resident_bytes = most.tolist()
        alone, _ = _training(name, "alone", rank)
        alone()
        seconds: dict[Callable[[], Tensor], list[float]] = {step: [], alone: []}
        for _ in range(MEASURED):
            for each, taken in seconds.items():
                dist.barrier()
                start = time.perf_counter()
                each().item()
                taken.append(time.perf_counter() - start)
        step_s, alone_s = map(statistics.median, seconds.values())
        row = {"live_bytes": live_bytes, "resident_bytes": resident_bytes, "step_s": step_s, "alone_s": alone_s}
        plan = plan_of()
        if plan is not None:
            options = ", ".join(f"{key}={value!r}" for key, value in plan.options.items())
            row |= {
                "predicted_bytes": plan.chosen.reserved_bytes,
                "predicted_s": plan.chosen.step_s,
                "options": options,
            }
    except zgraph.BudgetError as error:
        row = {"problem": str(error)}
    if rank == 0:
        print(json.dumps(row), flush=True)
    if way.partition("=")[0] not in ("zgraph", "fsdp2"):
        # DDP's part of the group would wait for gloo's threads with Python's lock held, which they may be waiting for.
        dist.barrier()
        os._exit(0)
    dist.destroy_process_group()


# All of it


def measure(name: str, way: str, timeout_s: float) -> Row:
    """Train in processes of their own."""
    budget = int(way.partition("=")[2]) if way.startswith("zgraph") else None
    with tempfile.TemporaryDirectory(prefix="zgraph-bench-") as directory:
        command = [sys.executable, __file__, "--model", name, "--way", way, "--store", f"{directory}/store"]
        logs = [Path(directory, f"rank{rank}") for rank in range(RANKS)]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
            for rank, log in enumerate(logs)
        ]
        try:
            told = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            return Row(name, way, budget, problem=f"did not finish in {timeout_s:.0f} s")
        finally:
            for rank in ranks:
                rank.kill()
        if not told[0].strip():
            last = (logs[0].read_text().strip().splitlines() or ["said nothing"])[-1]
            return Row(name, way, budget, problem=last)
    return Row(name, way, budget, **json.loads(told[0].strip().splitlines()[-1]))


def budgets(name: str, num: int) -> list[int]:
    """From what the fastest choice takes to what the smallest takes, evenly; and less than that."""

    def plan(memory: int) -> zgraph.Plan:
        model = ALL_MODELS[name]
        return zgraph.plan(model.build(), optimizer_of, batch=model.batch(0), world_size=RANKS, memory=memory)

    def optimizer_of(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, fused=True)

    most, least = plan(2**50).chosen.reserved_bytes, plan(1).chosen.reserved_bytes
    return [most - (most - least) * i // (num - 1) for i in range(num)] + [least - 1]


def sweep(names: list[str], num: int, backend: str, timeout_s: float) -> list[Row]:
    """All ways of all models."""
    rows = []
    for name in names:
        ways = [f"zgraph={budget}" for budget in budgets(name, num)]
        ways += ["fsdp2=plain", "fsdp2=checkpoint", *(f"{backend}={part}" for part in TORCH_BUDGETS)]
        for way in ways:
            rows.append(measure(name, way, timeout_s))
            told = rows[-1]
            print(
                f"{name}: {way}: {told.live_bytes} bytes, {told.step_s} of {told.alone_s} s",
                file=sys.stderr,
                flush=True,
            )
    return rows


def broken(rows: list[Row]) -> list[str]:
    """What should hold and does not."""
    found = []
    before: dict[str, float] = {}
    for row in rows:
        if row.budget_bytes is None or row.live_bytes is None or row.predicted_s is None:
            continue
        if row.live_bytes > row.budget_bytes:
            found.append(f"{row.model}, {row.way}: a rank allocated {row.live_bytes} bytes")
        if row.predicted_s < before.get(row.model, 0.0) * (1 - 1e-9):
            found.append(f"{row.model}, {row.way}: faster than with more memory")
        before[row.model] = row.predicted_s
    return found


def as_markdown(rows: list[Row]) -> str:
    """A table for each model; seconds are ratios to PyTorch's own step on each rank alone."""

    def bytes_of(num: int | None) -> str:
        return "" if num is None else f"{num / 1e6:.1f} MB"

    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        of_model = [row for row in rows if row.model == model]
        lines += [f"### {model}", "", "| way | budget | predicted | resident | allocated | step | options |"]
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        for row in of_model:
            way = "zgraph" if row.budget_bytes is not None else row.way
            ratio = f"{row.step_s / row.alone_s:.2f}" if row.step_s and row.alone_s else "refused"
            if row.problem and not row.problem.startswith("no options fit"):
                ratio = "fails"
            measured = (row.budget_bytes, row.predicted_bytes, row.resident_bytes, row.live_bytes)
            lines.append(f"| {' | '.join([way, *map(bytes_of, measured), ratio, row.options])} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> int:
    """Sweep, or be one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, three budgets")
    parser.add_argument("--inductor", action="store_true", help="torch.compile with generated kernels")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="some of them; default: all")
    parser.add_argument("--points", type=int, default=10, help="budgets of each model; default: 10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object for each way")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables between its marks")
    for name in ("model", "way", "store"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        load_malloc_counter({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")})
        serve(options.model, options.way, options.rank, options.store)
        return 0
    backend = "inductor" if options.inductor else "aot_eager_decomp_partition"
    names = list(QUICK_MODELS if options.quick else options.models or MODELS)
    rows = sweep(names, 3 if options.quick else options.points, backend, 300.0)
    if options.json is not None:
        options.json.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))
    text = as_markdown(rows)
    print(text)
    if options.markdown is not None:
        write_between_marks(options.markdown, text, "sweep")
    problems = broken(rows)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
