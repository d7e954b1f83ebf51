"""``zgraph calibrate``: measure the machine that it runs on, as a rank of a training job will find it.

It runs twice: one rank with all cores, and several ranks at once, each with its part of them, because ranks of a CPU
share cores and memory. On GPUs, each rank has one. Every measurement starts on all ranks together and repeats for the
same time. Other work on the machine comes and goes, so everything is measured in a few passes over the whole, and the
median time is kept.

What is measured is what zgraph does: collectives go through ``zgraph.comm``, results into new memory are allocated
each time, and operators are called as emitted steps call them. ``zgraph.calibration`` keeps and reads the results.
"""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import fx

from zgraph.calibration import Calibration, Run, check_writable, default_path
from zgraph.codegen import library
from zgraph.codegen.region import Region
from zgraph.comm import Comm
from zgraph.command_line import PATH, Command, Integer, json_option
from zgraph.direct import DirectComm
from zgraph.errors import OptionError
from zgraph.groups import default_backend
from zgraph.heap import release_free_memory
from zgraph.launching import launch_ranks
from zgraph.machines import available_cores
from zgraph.which_comm import make_comm

aten = torch.ops.aten

KIB, MIB = 2**10, 2**20
SIZES = tuple(4 * KIB * 4**i for i in range(8))
"""Bytes of a tensor, 4 KiB to 64 MiB."""

CPU_SHAPES = (
    *((1, n, n, n) for n in (32, 64, 128, 256, 512, 1024)),
    *((1, 1, n, n) for n in (256, 1024, 2048)),
    *((1, m, 1024, 256) for m in (8, 64, 512, 2048)),
    *((1, m, 256, 1024) for m in (8, 64, 512, 2048)),
    *((1, m, 1024, 4096) for m in (16, 64)),
    (1, 16, 4096, 1024),
    (1, 1024, 4096, 16),
    *((1, 512, 32, k) for k in (128, 2048)),
    *((1, 64, 2048, k) for k in (64, 512)),
    *((16, n, n, 64) for n in (32, 128, 256)),
    *((16, n, 64, n) for n in (32, 128, 256)),
)
GPU_SHAPES = (
    *((1, n, n, n) for n in (128, 256, 512, 1024, 2048, 4096, 8192)),
    *((1, 1, n, n) for n in (1024, 4096, 8192)),
    *((1, m, 4096, 1024) for m in (16, 128, 512, 2048, 8192)),
    *((1, m, 1024, 4096) for m in (16, 128, 512, 2048, 8192)),
    *((1, 4096, 128, k) for k in (256, 4096)),
    *((32, n, n, 128) for n in (128, 512, 1024)),
    *((32, n, 128, n) for n in (128, 512, 1024)),
)
MOST_OPERATIONS = {"cpu": {torch.float16: 2 * 64**3, torch.float64: 2 * 512**3}, "cuda": {torch.float64: 2 * 2048**3}}
"""Of a product that is measured of dtypes in which large ones take long: PyTorch has no fast float16 on CPUs."""

DISK_BYTES = 64 * MIB

PASSES = 3
LEAST_S = 25
"""About what one pass of each number of ranks takes at least on a CPU that is quiet, whatever the budget."""

WARM_S = 1.0
"""After so long no more operands are made for one measurement."""

COLD_BYTES, MOST_OPERANDS = 128 * MIB, 64
"""Operands that are gone through in turns: more bytes than a cache holds, or so many of small ones."""


@dataclass(frozen=True)
class Options:
    """What the command line can choose.

    Attributes:
        ranks: so many at once in the second run.
        budget_s: seconds that all measurements together aim at; starting ranks comes on top. No further pass begins
            where those before have taken twice their share of that.
        directory: where a file is written and read to measure its disk.
    """

    ranks: int
    budget_s: float = 45.0
    directory: Path = Path(tempfile.gettempdir())


def default_ranks() -> int:
    """One for each GPU; on a CPU two, if there are two cores."""
    return torch.cuda.device_count() or min(2, available_cores())


def measure(options: Options) -> Calibration:
    """This machine, as one rank alone finds it and as each of several at once does.

    Raises:
        OptionError: more ranks than GPUs, or no file can be written in the directory.
        RankError: a rank failed.
    """
    if torch.cuda.is_available() and options.ranks > torch.cuda.device_count():
        raise OptionError(f"{options.ranks} ranks are more than the {torch.cuda.device_count()} GPU(s) here")
    if not os.access(options.directory, os.W_OK | os.X_OK):
        raise OptionError(f"no file can be written in {options.directory}", fix="choose another --directory")
    counts = sorted({1, options.ranks})
    share = options.budget_s / len(counts)
    start = time.perf_counter()
    efforts = {ranks: _Effort(ranks, share, PASSES, COLD_BYTES) for ranks in counts}
    runs = {ranks: launch_ranks(_rank, ranks, effort, options.directory)[0] for ranks, effort in efforts.items()}
    host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    device, devices, units, memory = platform.processor() or platform.machine(), available_cores(), 1, host_memory
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device, devices = properties.name, torch.cuda.device_count()
        units, memory = properties.multi_processor_count, properties.total_memory
    return Calibration(
        device_type="cuda" if torch.cuda.is_available() else "cpu",
        device=device,
        devices=devices,
        units=units,
        memory_bytes=memory,
        host_memory_bytes=host_memory,
        torch=torch.__version__,
        seconds=time.perf_counter() - start,
        runs=runs,
    )


def render(found: Calibration) -> Table:
    """What matters most, one column for each number of ranks."""
    counts = sorted(found.runs)
    table = Table(
        title=f"{found.device}, torch {found.torch}",
        caption="Best product of each dtype; otherwise of the largest size: bytes read plus written, of the full "
        "tensor, or of the file.",
        show_edge=False,
    )
    table.add_column()
    for ranks in counts:
        table.add_column(f"{ranks} rank(s) of {found.runs[ranks].threads} thread(s)", justify="right")

    def row(name: str, texts: Iterable[str]) -> None:
        table.add_row(name, *texts)

    runs = [found.runs[ranks] for ranks in counts]
    row("operator", (f"{run.launch_s * 1e6:.1f} us" for run in runs))
    for dtype in runs[0].matmul:
        best = (max(2 * b * m * n * k / s for b, m, n, k, s in run.matmul[dtype]) for run in runs)
        row(f"products of {dtype}", (f"{rate / 1e9:,.0f} GFLOP/s" for rate in best))
    row("into new memory", (_per_second(run.memory) for run in runs))
    row("in place", (_per_second(run.memory_in_place) for run in runs))
    for kind in runs[-1].collectives:
        row(kind, (_per_second(run.collectives.get(kind)) for run in runs))
    for direction in ("write", "read"):
        row(f"disk, {direction}", (_per_second(run.disk.get(direction)) for run in runs))
    return table


def _per_second(rows: list[list[float]] | None) -> str:
    """Rate of the largest size."""
    return f"{decimal(int(rows[-1][0] / rows[-1][1]))}/s" if rows else ""


@dataclass(frozen=True)
class _Effort:
    """What a rank is told: how many there are, and for how long and over how much memory each point is measured."""

    ranks: int
    budget_s: float
    passes: int
    cold_bytes: int


def _rank(effort: _Effort, directory: Path) -> Run:
    """One rank: everything in the same order on all of them."""
    bench, ranks = _Bench(effort), effort.ranks
    if ranks > 1:
        dist.init_process_group(default_backend() if bench.device.type == "cuda" else "gloo")
    try:
        start, passes = time.perf_counter(), list[Run]()
        for i in range(effort.passes):
            bench.name = f"{ranks} rank(s), pass {i + 1} of {effort.passes}"
            passes.append(_pass(bench, directory))
            took = bench.most(time.perf_counter() - start)  # other programs may have made it take far longer
            is_last = i + 1 == effort.passes or took > 2 * effort.budget_s
            bench.say(f"done after {took:.0f} s{', which is all' if is_last else ''}", is_over=True)
            if is_last:
                break
        return middle(passes)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def _pass(bench: _Bench, directory: Path) -> Run:
    comm = make_comm(dist.group.WORLD, {bench.device.type}) if bench.ranks > 1 else None
    parts: dict[str, Callable[[], Any]] = {
        "launch_s": lambda: _launch(bench),
        "matmul": lambda: _products(bench),
        "memory": lambda: _streams(bench, in_place=False),
        "memory_in_place": lambda: _streams(bench, in_place=True),
        "vector": lambda: _arithmetic(bench),
        "transcendental": lambda: _exponentials(bench),
        "gather": lambda: _lookups(bench),
        "attention": lambda: _attention(bench),
        "collectives": lambda: _collectives(bench, comm),
        "loops": lambda: _loops(bench),
        "host_link": lambda: _host_link(bench),
        "host_memory": lambda: _host_memory() if bench.device.type != "cpu" and bench.ranks == 1 else [],
        "disk": lambda: _disk(directory) if bench.ranks == 1 else {},
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        bench.say(name.removesuffix("_s").replace("_", " "))
        found[name] = part()
    return Run(threads=torch.get_num_threads(), reads_peers=isinstance(comm, DirectComm), **found)


def middle(passes: Sequence[Run]) -> Run:
    """Of passes over the same points, the median time of each point."""

    def of(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {key: of([value[key] for value in values]) for key in first}
        if isinstance(first, list):
            same = zip(*values, strict=True)
            return [[*points[0][:-1], statistics.median(point[-1] for point in points)] for points in same]
        return statistics.median(values) if isinstance(first, float) else first

    return Run(**{each.name: of([getattr(run, each.name) for run in passes]) for each in fields(Run)})


class _Bench:
    """Times work on all ranks at once, for as long as the budget has for each measurement."""

    POINTS = 150
    """About as many measurements as one pass has."""

    def __init__(self, effort: _Effort) -> None:
        self.ranks, self.cold_bytes = effort.ranks, effort.cold_bytes
        self.window_s = effort.budget_s / self.POINTS / effort.passes
        self.name = ""
        self._speaks = int(os.environ.get("RANK", "0")) == 0
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(max(1, available_cores() // effort.ranks))

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Ones, written to: pages of memory exist only then."""
        return torch.ones(shape, dtype=dtype, device=self.device)

    def say(self, what: str, *, is_over: bool = False) -> None:
        """What this pass is at: in one line of a terminal, and elsewhere only that it is over."""
        on_terminal = sys.stderr.isatty()
        if self._speaks and (is_over or on_terminal):
            start, end = ("\r\x1b[K" if on_terminal else ""), ("\n" if is_over else "")
            sys.stderr.write(f"{start}{self.name}: {what}{end}")
            sys.stderr.flush()

    def most(self, seconds: float) -> float:
        """The most of what each rank took, the same on all of them."""
        found = torch.full((1,), seconds, dtype=torch.float64, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def together(self) -> None:
        """Wait for the other ranks."""
        if self.ranks > 1:
            dist.barrier()
        self.finish()

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, make: Callable[[], Callable[[], Any]], num_bytes: int, *, is_fresh: bool = False) -> float:
        """Median time of one piece of work, which is repeated for the time that there is.

        On a CPU as in a step: operands have left the cache since they were made, and results take the place of others
        that died long ago. On a GPU, repetitions are recorded once and played back, so that no launch by Python is in
        them.

        Args:
            make: the work on operands of its own.
            num_bytes: of these, about.
            is_fresh: results lie in memory that the system has to give first, as most large ones of a step do, which
                gives back what is free before its peaks.
        """
        if self.device.type == "cuda":
            repeated, per_sample = self._recorded(make())
            works = [repeated]
            made: list[Any] = [repeated()]
        else:
            works, made, per_sample, enough = [], [], 1, time.perf_counter() + WARM_S
            for _ in range(min(max(self.cold_bytes // num_bytes, 1), MOST_OPERANDS)):
                works.append(make())
                made.append(works[-1]())
                if time.perf_counter() > enough:
                    break
        results: deque[Any] = deque(made, maxlen=len(works))
        made.clear()
        self.together()
        samples: list[float] = []
        end = time.perf_counter() + self.window_s
        for work in itertools.cycle(works):
            start = time.perf_counter()
            results.append(work())
            self.finish()
            samples.append((time.perf_counter() - start) / per_sample)
            if is_fresh:
                results.clear()
                release_free_memory()
            if len(samples) > 2 and time.perf_counter() > end:
                return statistics.median(samples)
        raise AssertionError("there is always work")

    def _recorded(self, work: Callable[[], Any], count: int = 20) -> tuple[Callable[[], Any], int]:
        aside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            work()  # what libraries allocate on first use cannot be recorded
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                work()
        return graph.replay, count

    def seconds_of_collective(self, work: Callable[[], Any], num_bytes: int) -> float:
        """Median over rounds of the mean of a few calls; all ranks make as many, which a time window would not see to.

        A collective ends when the slowest rank has done its part, so its ordinary time is wanted and not its best.
        """
        calls = max(1, min(20, 4 * MIB // num_bytes))
        work()
        self.together()
        start = time.perf_counter()
        work()
        self.finish()
        once = self.most(time.perf_counter() - start)
        calls = max(1, min(calls, int(self.window_s / once)))  # ranks that share busy cores wait long for each other
        samples = []
        for _ in range(3):
            self.together()
            start = time.perf_counter()
            for _ in range(calls):
                work()
            self.finish()
            samples.append((time.perf_counter() - start) / calls)
        return statistics.median(samples)


def _same(work: Callable[[], Any]) -> Callable[[], Callable[[], Any]]:
    """For work whose operands stay in cache: each time on the same ones."""
    return lambda: work


def _launch(bench: _Bench, calls: int = 200) -> float:
    """Seconds that the host spends on an operator which has next to nothing to do: a mean over some of a block's."""
    x = bench.tensor(8, 8)
    weight = bench.tensor(8)

    def block() -> None:
        normed = aten.native_layer_norm.default(x, [8], weight, weight, 1e-5)[0]
        product = aten.addmm.default(weight, normed, aten.t.default(x))
        active = aten.gelu.default(aten.view.default(product, [64]))
        aten.sum.dim_IntList(aten.add.Tensor(active, active), [0])

    samples = []
    bench.together()
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            block()
        samples.append((time.perf_counter() - start) / calls / 5)
        bench.finish()
    return statistics.median(samples)


def _products(bench: _Bench) -> dict[str, list[list[float]]]:
    """Batch, m, n, k and seconds of products, by name of dtype."""
    kind = bench.device.type
    found = {}
    with _tf32(allowed=False):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            found[_name(dtype)] = _products_of(bench, dtype, MOST_OPERATIONS[kind].get(dtype))
    if kind == "cuda" and torch.cuda.get_device_capability(bench.device) >= (8, 0):
        with _tf32(allowed=True):
            found["tf32"] = _products_of(bench, torch.float32, None)
    return found


def _products_of(bench: _Bench, dtype: torch.dtype, most: int | None) -> list[list[float]]:
    rows: list[list[float]] = []
    for batch, m, n, k in CPU_SHAPES if bench.device.type == "cpu" else GPU_SHAPES:
        if most is not None and 2 * batch * m * n * k > most:
            continue

        def product(batch: int = batch, m: int = m, n: int = n, k: int = k) -> Callable[[], torch.Tensor]:
            left, right = bench.tensor(batch, m, k, dtype=dtype), bench.tensor(batch, k, n, dtype=dtype)
            made = bench.tensor(batch, m, n, dtype=dtype)  # in an arena: new memory takes time of its own
            if batch == 1:
                return partial(aten.mm.out, left[0], right[0], out=made[0])
            return partial(aten.bmm.out, left, right, out=made)

        num_bytes = batch * (m * k + k * n + m * n) * dtype.itemsize
        rows.append([batch, m, n, k, bench.seconds(product, num_bytes)])
    return rows


def _streams(bench: _Bench, *, in_place: bool) -> list[list[float]]:
    """Bytes read and written, and seconds, of additions over tensors of all sizes."""
    rows = []
    operator = aten.add_.Tensor if in_place else aten.add.Tensor
    for size in SIZES:

        def stream(size: int = size) -> Callable[[], torch.Tensor]:
            return partial(operator, bench.tensor(size // 4), 1.0)

        rows.append([2 * size, bench.seconds(stream, size if in_place else 2 * size, is_fresh=not in_place)])
    return rows


def _arithmetic(bench: _Bench) -> dict[str, list[list[float]]]:
    """Operations and seconds of a multiplication and an addition in one kernel, in place in cache, by name of dtype."""
    found = {}
    largest = 64 * KIB if bench.device.type == "cpu" else 4 * MIB
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        rows = []
        for numel in (KIB, largest):
            x, y = bench.tensor(numel, dtype=dtype), bench.tensor(numel, dtype=dtype)
            work = partial(aten.addcmul_.default, x, y, y)  # the same operands each time, in cache
            rows.append([2 * numel, bench.seconds(_same(work), COLD_BYTES)])
        found[_name(dtype)] = rows
    return found


def _exponentials(bench: _Bench) -> list[list[float]]:
    """Numbers of exponentials, and seconds, into memory in use."""
    rows = []
    for numel in (4 * KIB, 64 * KIB, MIB, 4 * MIB):
        x, out = bench.tensor(numel), bench.tensor(numel)
        work = partial(aten.exp.out, x, out=out)
        rows.append([numel, bench.seconds(_same(work), COLD_BYTES)])
    return rows


def _loops(bench: _Bench, width: int = KIB) -> dict[str, list[list[float]]]:
    """Operations, or exponentials, and seconds of chains of them that zgraph makes loops of, in cache."""
    if bench.device.type != "cpu" or library.problem() is not None:
        return {}
    found: dict[str, list[list[float]]] = {}
    for name, target, length in (("operations", aten.mul.Tensor, 32), ("functions", aten.exp.default, 8)):
        found[name] = []
        for rows in (2, 64):
            x = bench.tensor(rows, width)
            chain = _chain(target, length, x)
            assert chain.operations is not None
            num = chain.operations[name == "functions"]
            found[name].append([num, bench.seconds(_same(partial(chain, x)), COLD_BYTES)])
    return found


def _chain(target: Any, length: int, x: torch.Tensor) -> Region:
    """A region of one operator after another, each on what the one before gives, and on ``x`` if it takes two."""
    graph = fx.Graph()
    value = first = graph.placeholder("x")
    first.meta["val"] = x
    for _ in range(length):
        value = graph.call_function(target, (value, first)[: len(target._schema.arguments)])
        value.meta["val"] = x
    graph.output([value])
    return Region("chain", graph, 1, (None,), is_compiled=True)


def _lookups(bench: _Bench, width: int = 256, vocabulary: int = 32 * KIB) -> list[list[float]]:
    """Bytes read and written, and seconds, of scattered rows of an embedding of float32."""
    table = bench.tensor(vocabulary, width)
    rows = []
    for count in (16, 256, 4 * KIB, 32 * KIB):
        # A step prime to the vocabulary visits rows far apart, each once.
        index = (torch.arange(count, device=bench.device) * 12347) % vocabulary
        work = partial(aten.embedding.default, table, index)
        rows.append([2 * count * width * 4, bench.seconds(_same(work), COLD_BYTES)])
    return rows


def _attention(bench: _Bench) -> dict[str, list[list[float]]]:
    """Operations and seconds of fused causal attention forward, by name of dtype.

    Two products over all pairs of tokens, of which causality leaves half: 2 * heads * tokens**2 * width operations.
    """
    found = {}
    on_cpu = bench.device.type == "cpu"
    heads, width = (8, 64) if on_cpu else (32, 128)
    for dtype in (torch.float32, torch.bfloat16):
        rows: list[list[float]] = []
        for tokens in (32, 128, 512) if on_cpu else (128, 512, 2048, 8192):

            def attend(tokens: int = tokens, dtype: torch.dtype = dtype) -> Callable[[], torch.Tensor]:
                x = bench.tensor(1, heads, tokens, width, dtype=dtype)
                return partial(F.scaled_dot_product_attention, x, x, x, is_causal=True)

            num_bytes = 2 * heads * tokens * width * dtype.itemsize
            rows.append([2 * heads * tokens**2 * width, bench.seconds(attend, num_bytes)])
        found[_name(dtype)] = rows
    return found


def _collectives(bench: _Bench, comm: Comm | None) -> dict[str, list[list[float]]]:
    """Bytes of the full tensor, and seconds from start to arrival, by kind; none of one rank."""
    if comm is None:
        return {}
    found: dict[str, list[list[float]]] = {"all_gather": [], "reduce_scatter": [], "all_reduce": []}
    for size in SIZES:
        full = bench.tensor(size // 4 // bench.ranks * bench.ranks)
        for kind, rows in found.items():
            seconds = bench.seconds_of_collective(partial(_collective, comm, kind, full), size)
            rows.append([full.nbytes, seconds])
    return found


def _collective(comm: Comm, kind: str, full: torch.Tensor) -> torch.Tensor:
    if kind == "all_gather":
        return comm.wait(comm.all_gather(comm.shard(full)))
    if kind == "reduce_scatter":
        return comm.wait(comm.reduce_scatter(full, "avg"))
    return comm.wait(comm.all_reduce(full, "avg"))


def _host_link(bench: _Bench) -> dict[str, list[list[float]]]:
    """Bytes and seconds of copies to the device and back, a half of each, from pinned and pageable memory."""
    if bench.device.type == "cpu":
        return {}
    found = {}
    for name in ("pinned", "pageable"):
        rows = []
        for size in (4 * KIB, MIB, 64 * MIB):
            host = torch.ones(size, dtype=torch.uint8, pin_memory=name == "pinned")
            device = torch.empty_like(host, device=bench.device)
            samples = []
            for _ in range(5):
                bench.together()
                start = time.perf_counter()
                device.copy_(host, non_blocking=True)
                host.copy_(device, non_blocking=True)
                bench.finish()
                samples.append((time.perf_counter() - start) / 2)
            rows.append([size, statistics.median(samples)])
        found[name] = rows
    return found


def _host_memory() -> list[list[float]]:
    """Bytes and seconds of adding two tensors on all cores of the host."""
    found: list[list[float]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(available_cores())
    try:
        for size in (4 * MIB, 64 * MIB):
            one, two, three = (torch.ones(size // 4) for _ in range(3))
            samples = []
            for _ in range(5):
                start = time.perf_counter()
                torch.add(one, two, out=three)
                samples.append(time.perf_counter() - start)
            found.append([3 * size, statistics.median(samples)])
    finally:
        torch.set_num_threads(threads)
    return found


def _disk(directory: Path) -> dict[str, list[list[float]]]:
    """Bytes and seconds to write a new file and have it on the disk, and to read it from there."""
    found: dict[str, list[list[float]]] = {"write": [], "read": []}
    for size in (4 * KIB, DISK_BYTES):
        pages = mmap.mmap(-1, size)  # as O_DIRECT wants them: whole pages
        pages.write(os.urandom(size))
        samples: dict[str, list[float]] = {"write": [], "read": []}
        for _ in range(3):
            with tempfile.TemporaryFile(dir=directory) as file:  # without a name, so that nothing can stay behind
                for direction, flags in (("write", os.O_WRONLY), ("read", os.O_RDONLY)):
                    with _past_the_cache(f"/proc/self/fd/{file.fileno()}", flags) as descriptor:
                        start = time.perf_counter()
                        _move_all(descriptor, pages, direction)
                        samples[direction].append(time.perf_counter() - start)
        for direction, seconds in samples.items():
            found[direction].append([size, statistics.median(seconds)])
    return found


@contextmanager
def _past_the_cache(name: str, flags: int) -> Iterator[int]:
    """A file without the page cache in between; where the filesystem has no such thing, with none of it cached yet."""
    try:
        descriptor = os.open(name, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(name, flags)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _move_all(descriptor: int, pages: mmap.mmap, direction: str) -> None:
    view = memoryview(pages)
    done = 0
    while done < len(view):
        some = view[done : done + 8 * MIB]
        moved = os.pwrite(descriptor, some, done) if direction == "write" else os.preadv(descriptor, [some], done)
        assert moved > 0, "the file ended early"
        done += moved
    if direction == "write":
        os.fsync(descriptor)


@contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    """Products of float32 with or without TF32, whatever the process had chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@click.command(
    "calibrate",
    cls=Command,
    short_help="measure this machine, so that costs are predicted for it",
    epilog="Example: zgraph calibrate --ranks 2",
)
@click.option(
    "--ranks", type=Integer(1, 64), default=default_ranks, show_default="one for each GPU, or two", help="at once"
)
@click.option("--output", type=PATH, metavar="FILE", show_default="where other commands look")
@click.option(
    "--budget",
    type=Integer(1, 3600),
    default=45,
    metavar="SECONDS",
    help=f"aimed at, {LEAST_S} being about the least",
)
@click.option(
    "--directory",
    type=PATH,
    default=Options.directory,
    help="where a file is written and read to measure its disk",
)
@json_option("what was saved")
def command(ranks: int, output: Path | None, budget: int, directory: Path, *, as_json: bool) -> bool:
    """Measure how long products of matrices, movement in memory, collectives and disk transfers take, with one rank and
    with several at once, and save it where find_hardware('cpu') and other commands look: $ZGRAPH_HARDWARE, or
    zgraph/hardware.json in $XDG_CACHE_HOME or ~/.cache. On a machine with GPUs, these are measured.
    """
    path = output or default_path()
    check_writable(path)
    busy = os.getloadavg()[0]
    if busy > 0.5:
        click.echo(f"other programs keep {busy:.1f} core(s) busy: times will be too long", err=True)
    about = max(budget, LEAST_S)
    click.echo(f"measuring for about {about} s, longer where cores are busy; it will be saved to {path}", err=True)
    found = measure(Options(ranks, budget, directory))
    found.save(path)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        Console().print(render(found))
    click.echo(f"measured in {found.seconds:.0f} s; saved to {path}", err=True)
    return True
