"""``zgraph demo``: train one model with zgraph and with plain PyTorch in the same run, and compare.

A byte-level GPT of about 10M parameters learns the text of Python's own standard library. zgraph trains it sharded
over a few gloo ranks, each with its part of the batch; plain eager PyTorch trains a copy in rank 0's process on the
whole batch. Steps alternate, so that both see the same machine. The losses have to agree.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import zgraph
from zgraph.command_line import Command, Integer, json_option
from zgraph.errors import ZgraphError
from zgraph.launching import launch_ranks

LAYERS, WIDTH, HEADS, TOKENS = 8, 320, 5, 256
SEQUENCES = 4
"""Per rank and step, each of ``TOKENS`` bytes."""

TEXT_BYTES = 4 * 2**20
BOUND = 1e-4
"""Largest relative difference of two losses that are called equal, in float32."""


class Block(nn.Module):
    """Causal attention, then a feed-forward layer, each on its normalised input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.feed_forward_norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states of shape (batch, tokens, WIDTH) to the same shape."""
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(-2))
        fed: Tensor = self.down(F.gelu(self.up(self.feed_forward_norm(x))))
        return x + fed


class GPT(nn.Module):
    """A GPT over bytes; called with targets, it returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(256, WIDTH)
        self.position_embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, text: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of ``targets``, the byte after each byte of ``text``, both (batch, tokens)."""
        x = self.byte_embedding(text) + self.position_embedding(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Options:
    """What the command line can choose."""

    steps: int = 20
    ranks: int = 2
    zero: int = 3


@dataclass
class Run:
    """What was measured of one way to train; bytes are those kept between steps, of one rank."""

    threads: int
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    param_bytes: int = 0
    optimizer_state_bytes: int = 0
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def median_step_s(self) -> float:
        """Median over the steps after the first, which also compiles and creates the optimizer's state."""
        return statistics.median(self.step_s[1:])


@dataclass
class Report:
    """Both runs, and whether their losses agree."""

    options: Options
    num_parameters: int
    text_bytes: int
    bytes_per_step: int
    zgraph: Run
    plain: Run
    capture_s: float = 0.0
    passes_s: float = 0.0
    bound: float = BOUND

    @property
    def differences(self) -> list[float]:
        """Relative difference of the losses at each step; infinite where one is not finite."""
        return [
            abs(ours - plain) / abs(plain) if math.isfinite(ours) and math.isfinite(plain) else math.inf
            for ours, plain in zip(self.zgraph.losses, self.plain.losses, strict=True)
        ]

    @property
    def agrees(self) -> bool:
        """Whether no loss differs by more than the bound."""
        return max(self.differences) <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """As plain data, with what is derived from it."""
        return asdict(self) | {"differences": self.differences, "agrees": self.agrees}


def read_text(limit_bytes: int = TEXT_BYTES) -> Tensor:
    """The standard library's Python sources in order of their paths, up to a size, as bytes.

    Raises:
        ZgraphError: the sources are not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    elsewhere = {"site-packages", "dist-packages", "test", "tests"}  # differ from one installation to another
    sources = sorted(path for path in root.rglob("*.py") if not elsewhere & set(path.relative_to(root).parts))
    text = bytearray()
    for path in sources:
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    if len(text) < limit_bytes // 4:
        raise ZgraphError(
            f"found {len(text)} bytes of Python source in {root}, the demo needs {limit_bytes // 4}",
            fix="run it with a Python whose standard library is installed as source files",
        )
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8)


def sample(text: Tensor, step: int, num_sequences: int) -> tuple[Tensor, Tensor]:
    """A batch that depends only on the step: sequences of the text, and the byte after each of theirs."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - TOKENS, (num_sequences, 1), generator=generator)
    windows = text[starts + torch.arange(TOKENS + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def train(options: Options) -> Report | None:
    """One rank of the demo; rank 0 also trains with plain PyTorch, and reports."""
    rank = int(os.environ["RANK"])
    threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
    torch.set_num_threads(threads)
    text = read_text()

    torch.manual_seed(0)
    model = GPT()
    plain = _PlainTraining(copy.deepcopy(model), threads * options.ranks) if rank == 0 else None
    num_parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model = zgraph.compile(model, optimizer=optimizer, zero=options.zero, progress=False)

    run = Run(threads)
    with _display(options.steps, shown=rank == 0) as show:
        for step in range(options.steps):
            batch = sample(text, step, SEQUENCES * options.ranks)
            if plain is not None:
                plain.step(batch)
                torch.set_num_threads(threads)
            _wait_for_all_ranks()
            start = time.perf_counter()
            loss = model.train_step(*(part[rank * SEQUENCES : (rank + 1) * SEQUENCES] for part in batch))
            _wait_for_all_ranks()
            run.step_s.append(time.perf_counter() - start)
            run.losses.append(loss.item())
            if plain is not None:
                show(run, plain.run)

    stats = model.stats()
    if dist.is_initialized():
        dist.destroy_process_group()
    if plain is None:
        return None
    run.param_bytes, run.optimizer_state_bytes = stats["param_bytes"], stats["optimizer_state_bytes"]
    run.collectives = stats["collectives"]
    return Report(
        options,
        num_parameters,
        text.numel(),
        SEQUENCES * TOKENS * options.ranks,
        zgraph=run,
        plain=plain.finish(),
        capture_s=stats["capture_s"],
        passes_s=stats["passes_s"],
    )


class _PlainTraining:
    """The same training, written as everybody writes it."""

    def __init__(self, model: nn.Module, threads: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.run = Run(threads)

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """One step on the whole batch, on the threads that all ranks have together."""
        torch.set_num_threads(self.run.threads)
        start = time.perf_counter()
        loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.run.step_s.append(time.perf_counter() - start)
        self.run.losses.append(loss.item())

    def finish(self) -> Run:
        """What was measured, with the bytes that are kept."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        self.run.param_bytes = sum(p.nbytes for p in self.model.parameters())
        self.run.optimizer_state_bytes = sum(value.nbytes for value in states if isinstance(value, Tensor))
        return self.run


def _wait_for_all_ranks() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _display(num_steps: int, *, shown: bool) -> Iterator[Callable[[Run, Run], None]]:
    """Yield what shows a finished step: a progress bar on a terminal, a line elsewhere; on standard error."""
    console = Console(stderr=True, quiet=not shown)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("capturing and compiling the first step", total=num_steps)

        def show(ours: Run, plain: Run) -> None:
            text = (
                f"loss {ours.losses[-1]:.4f} zgraph, {plain.losses[-1]:.4f} plain; "
                f"{ours.step_s[-1]:.2f} s and {plain.step_s[-1]:.2f} s"
            )
            progress.update(task, description=text, advance=1)
            if progress.disable:
                console.print(f"step {len(ours.losses)}/{num_steps}: {text}", soft_wrap=True)

        yield show


def launch(options: Options) -> Report:
    """Run ``train`` on all ranks with torchrun's own machinery, on this machine's loopback.

    Raises:
        RankError: a rank failed; names it and says why.
    """
    reports = launch_ranks(train, options.ranks, options)
    report = reports[0]
    assert report is not None
    return report


def render(report: Report) -> Table:
    """The comparison as one table."""
    options, ours, plain = report.options, report.zgraph, report.plain
    table = Table(
        title=f"GPT over bytes, {report.num_parameters:,} parameters, float32, AdamW",
        caption=f"In this run, steps alternating. zgraph: {options.ranks} gloo rank(s) of {ours.threads} thread(s); "
        f"its first step captures ({report.capture_s:.1f} s) and rewrites ({report.passes_s:.1f} s) the graph. "
        f"Plain PyTorch: eager, one process of {plain.threads} thread(s), the whole batch. Each step learns from "
        f"{report.bytes_per_step:,} of {report.text_bytes:,} bytes of text. Memory is what is kept between steps; "
        "collectives are those of one rank in one step.",
        show_edge=False,
    )
    table.add_column()
    table.add_column(f"zgraph, ZeRO-{options.zero}", justify="right")
    table.add_column("plain PyTorch", justify="right")
    table.add_column("compared", justify="right")

    for step, difference in enumerate(report.differences):
        table.add_row(
            f"loss, step {step + 1}", f"{ours.losses[step]:.6f}", f"{plain.losses[step]:.6f}", f"{difference:.1e}"
        )
    table.add_section()
    largest = f"{max(report.differences):.1e} {'ok' if report.agrees else 'TOO LARGE'}"
    table.add_row("largest, relative", f"bound {report.bound:.0e}", "", largest)

    table.add_section()
    for name, attribute in (("parameters", "param_bytes"), ("optimizer state", "optimizer_state_bytes")):
        kept: tuple[int, int] = getattr(ours, attribute), getattr(plain, attribute)
        table.add_row(f"{name}, per rank", *map(decimal, kept), f"x {kept[0] / kept[1]:.2f}")
    table.add_section()
    for name, total in sorted(ours.collectives.items()):
        table.add_row(name, f"{total['count']} of {decimal(total['bytes'])} in all", "", "")
    table.add_section()
    table.add_row("first step", f"{ours.step_s[0]:.2f} s", f"{plain.step_s[0]:.2f} s", "")
    seconds = ours.median_step_s, plain.median_step_s
    table.add_row("later steps, median", *(f"{s:.2f} s" for s in seconds), f"x {seconds[0] / seconds[1]:.2f}")
    return table


@click.command(
    "demo",
    cls=Command,
    short_help="train a GPT with zgraph and with plain PyTorch, and compare",
    epilog="Example: zgraph demo --ranks 2 --zero 1 --steps 5",
)
@click.option("--steps", type=Integer(2, 10_000), default=Options.steps)
@click.option("--ranks", type=Integer(1, 64), default=Options.ranks)
@click.option("--zero", type=Integer(0, 3), default=Options.zero, help="ZeRO stage")
@json_option("the report")
def command(steps: int, ranks: int, zero: int, *, as_json: bool) -> bool:
    """Train a byte-level GPT of 10M parameters on the text of Python's standard library, with zgraph on several ranks
    and with plain PyTorch in one process, and compare losses, memory, communication and time.

    Exits with status 1 if a loss differs by more than 1e-04, relative.
    """
    report = launch(Options(steps, ranks, zero))
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        Console().print(render(report))
    if not report.agrees:
        largest = max(report.differences)
        click.echo(f"zgraph demo: the losses part by {largest:.1e}, bound {report.bound:.0e}", err=True)
    return report.agrees
