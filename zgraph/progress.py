"""What a run is at: the phases of compiling, and the steps of a training loop.

Only rank 0 speaks, and only on a terminal; a file of scalars is written where one is asked for. A step that is not
told costs a comparison: tensors are read, which waits for a GPU, every so many steps alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text
from torch import nn

from zgraph import compile_times
from zgraph.compile_times import Compile, Estimate
from zgraph.errors import OptionError
from zgraph.files import writing
from zgraph.pipeline import Pass, PassRecord, Watch
from zgraph.plans import show_bytes, show_s
from zgraph.program import Program

log = logging.getLogger("zgraph")

_live: list[Bar] = []
"""Bars of training loops that are shown now: a terminal has room for one display."""


def is_first_rank() -> bool:
    """Whether this process speaks for all ranks."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


# Compiling

PASSES = "passes"
"""The phase of passes and their proofs."""


@dataclass
class Phases:
    """What compiling is at, on a terminal while it lasts, and how long each part took in one line when it is done.

    How long it will take is said by those before it on this machine: see ``zgraph.compile_times``.

    Attributes:
        console: where it is shown; nothing is where it is no terminal.
        seconds: of each phase so far.
    """

    console: Console = field(default_factory=lambda: Console(stderr=True))
    seconds: dict[str, float] = field(default_factory=dict)
    _say: Callable[[str], None] = lambda _: None
    _num_passes: int = 0
    _estimate: Estimate = field(default_factory=lambda: Estimate(Compile("", is_first=True, num_modules=0)))
    _part_began: float = 0.0

    @contextmanager
    def shown(self, done: str, model: nn.Module, *, is_first: bool, asked: bool) -> Iterator[Phases]:
        """Show them inside, if it is asked for and this is the process that speaks.

        Args:
            done: what has been done at the end, in a word or two.
            model: that it is done for.
            is_first: whether it has not been done for that model before.
            asked: False shows nothing.
        """
        if not (asked and self.console.is_terminal and not _live and is_first_rank()):
            yield self
            return
        file = compile_times.path()
        before = compile_times.known(file)
        num_modules = sum(1 for _ in model.modules())
        self._estimate = Estimate(Compile(done, is_first, num_modules), before)
        self._part_began = time.perf_counter()
        columns = (TextColumn("zgraph: {task.description}"), TimeElapsedColumn(), _Left(self))
        with Bar(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=None)
            self._say = lambda text: bar.update(task, description=text)
            yield self
        compile_times.remember(file, self._estimate.now, before)
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {show_s(seconds)}" for name, seconds in self.seconds.items())
        self.console.print(f"zgraph: {done} in {show_s(total)}: {parts}", highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of compiling lasts inside."""
        self._say(name)
        start = self._part_began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if name != PASSES:  # each of them is a part
            self._part_ended(name)

    def captured(self, num_nodes: int) -> None:
        """The step is captured, and has so many nodes."""
        self._estimate = replace(self._estimate, now=replace(self._estimate.now, num_nodes=num_nodes))

    def left_s(self) -> float | None:
        """Seconds that are left, as far as that can be told."""
        return self._estimate.left_s(time.perf_counter() - self._part_began)

    def _part_ended(self, name: str) -> None:
        now, began = self._estimate.now, self._part_began
        self._part_began = time.perf_counter()
        parts = (*now.parts, (name, self._part_began - began))
        self._estimate = replace(self._estimate, now=replace(now, parts=parts))

    @property
    def watch(self) -> Watch:
        """Is told of each pass: see ``zgraph.pipeline.run``."""

        def watch(p: Pass | None, program: Program) -> None:
            if p is not None:
                self._part_ended(p.name)
                self._num_passes += 1
                self._say(f"passes: {self._num_passes} done, {p.name} the last; {program.num_nodes():,} nodes")

        return watch

    def divide(self, records: tuple[PassRecord, ...]) -> None:
        """Tell proofs apart from passes."""
        proofs = sum(record.verify_s for record in records)
        self.seconds[PASSES] -= proofs
        self.seconds["proofs"] = self.seconds.get("proofs", 0.0) + proofs


class _Left(ProgressColumn):
    """How much time is left, in words; nothing where that is not known."""

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self._phases = phases

    def render(self, task: Task) -> Text:
        left_s = self._phases.left_s()
        return Text("" if left_s is None else f"about {roughly(left_s)} left")


def roughly(seconds: float) -> str:
    """To one digit, in seconds or minutes: an estimate has no more."""
    rounded = float(f"{seconds / 60 if seconds >= 95 else seconds:.1g}")
    return f"{rounded:.0f} min" if seconds >= 95 else f"{max(rounded, 1.0):.0f} s"


# Training


class Progress:
    """Counts the steps of a training loop, and tells how it goes every so many of them.

        with zgraph.Progress(model, steps=1000, every=10, jsonl="run.jsonl") as progress:
            for x, y in batches:
                loss = model.train_step(x, y)
                progress.step(loss, tokens=x.numel())

    Told are the loss, seconds of a step and tokens per second since it was told last, memory that this rank takes and
    its budget, how long computing is predicted to wait for communication and disks in a step, and where a step has
    them its gradient norm, loss scale and skipped steps. On a terminal rank 0 shows a line; a file is written wherever
    it is asked for. The other ranks do nothing.

    Args:
        model: compiled.
        steps: how many there will be, if that is known.
        every: so many steps are told as one. Reading their loss waits for the device, once.
        jsonl: a file that gets one JSON object for each, at its end; numbers that are not finite are null.
        tensorboard: a directory for TensorBoard, which has to be installed.
        wandb: arguments of ``wandb.init``; Weights & Biases has to be installed.
        show: False shows nothing, on a terminal neither.

    Raises:
        OptionError: the model is not compiled, a number is out of range, or what is asked for is not installed.
        StateError: the file cannot be written.
    """

    def __init__(
        self,
        model: Any,
        *,
        steps: int | None = None,
        every: int = 10,
        jsonl: str | Path | None = None,
        tensorboard: str | Path | None = None,
        wandb: Mapping[str, Any] | None = None,
        show: bool = True,
    ) -> None:
        runtime: Any = getattr(model, "__dict__", {}).get("_zgraph")
        if runtime is None:
            raise OptionError(f"the model, a {type(model).__name__}, is not compiled", fix="zgraph.compile(model, ...)")
        self._model, self._runtime = model, runtime
        given: dict[str, Any] = {"steps": steps, "every": every}
        for name, number in given.items():
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise OptionError(f"{name}={number!r} is not a number of steps", fix="give a positive integer")
        self._steps, self._every = steps, every
        self._speaks = is_first_rank()
        self._sinks: list[_Sink] = []
        if self._speaks:
            self._sinks += [_Jsonl(jsonl)] if jsonl is not None else []
            self._sinks += [_TensorBoard(tensorboard)] if tensorboard is not None else []
            self._sinks += [_Wandb(wandb)] if wandb is not None else []
            if show and Console(stderr=True).is_terminal:
                self._sinks.append(_Terminal(steps))
        self.num_steps = 0
        self._started = self._told_at = time.perf_counter()
        self._told, self._tokens = 0, 0
        self._compiled: Any = None
        self._predicted: dict[str, float] = {}

    def __enter__(self) -> Progress:  # noqa: PYI034 -- Self came with Python 3.11
        self._started = self._told_at = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is shown and written."""
        with ExitStack() as closing:  # all of them, also where one fails
            for sink in self._sinks:
                closing.callback(sink.close)
            self._sinks = []

    def step(self, loss: torch.Tensor | float, *, tokens: int = 0, **scalars: torch.Tensor | float) -> None:
        """A step is done.

        Args:
            loss: of it; what ``train_step`` returns.
            tokens: of this rank's batch; each rank is taken to have as many.
            scalars: what else to tell, by name: metrics, or the learning rate.
        """
        self.num_steps += 1
        self._tokens += tokens
        if not self._sinks or (self.num_steps % self._every and self.num_steps != self._steps):
            return
        told = {"loss": _number(loss)}  # reading it waits until all steps so far are done
        now, count = time.perf_counter(), self.num_steps - self._told
        told |= {"time_s": now - self._started, "step_s": (now - self._told_at) / count}
        if self._tokens:
            world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            told["tokens_per_s"] = self._tokens * world / (now - self._told_at)
        told |= {name: _number(value) for name, value in scalars.items()}
        told |= self._of_model()
        for sink in list(self._sinks):
            self._tell(sink, told)
        self._told, self._tokens = self.num_steps, 0
        self._told_at = time.perf_counter()  # telling counts as no step's

    def _tell(self, sink: _Sink, told: Mapping[str, float]) -> None:
        """Let training go on, whatever a writer of scalars meets."""
        try:
            sink.tell(self.num_steps, told)
        except Exception as error:  # noqa: BLE001 -- a full disk, a service that is away
            self._sinks.remove(sink)
            log.warning("zgraph: %s writes no more scalars: %s", type(sink).__name__.strip("_"), error)

    def _of_model(self) -> dict[str, float]:
        last = self._runtime.last()
        if last is not self._compiled:  # predicting takes longer than all else here
            self._compiled, self._predicted = last, {}
            with suppress(OptionError):  # a GPU that is not known
                plan = self._model.plan
                self._predicted = {
                    "budget_bytes": plan.budget_bytes,
                    "predicted_step_s": plan.chosen.step_s,
                    "predicted_exposed_s": plan.chosen.exposed_s,
                }
        told = ("gradient_norm", "loss_scale", "num_skipped_steps")
        of_step = {name: value for name, value in self._model.stats().items() if name in told}
        return {**of_step, "memory_bytes": _taken_bytes(last.layout.buckets[0].device), **self._predicted}


def _number(value: torch.Tensor | float) -> float:
    return value.item() if isinstance(value, torch.Tensor) else value


def _taken_bytes(device: torch.device) -> int:
    """What this process takes of the memory that its budget is of."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Sink:
    def tell(self, step: int, told: Mapping[str, float]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class _Jsonl(_Sink):
    def __init__(self, path: str | Path) -> None:
        with writing(path, "choose another jsonl"):
            self._file: TextIO = Path(path).open("a", buffering=1)  # noqa: SIM115 -- it is closed with the loop

    def tell(self, step: int, told: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in told.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        self._file.close()


class _TensorBoard(_Sink):
    def __init__(self, directory: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OptionError("TensorBoard is not installed", fix="pip install tensorboard, or leave it out") from error
        self._writer: Any = SummaryWriter(str(directory))

    def tell(self, step: int, told: Mapping[str, float]) -> None:
        for name, value in told.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb(_Sink):
    def __init__(self, arguments: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise OptionError("Weights & Biases is not installed", fix="pip install wandb, or leave it out") from error
        self._run: Any = wandb.init(**arguments)

    def tell(self, step: int, told: Mapping[str, float]) -> None:
        self._run.log(dict(told), step=step)

    def close(self) -> None:
        self._run.finish()


class _Terminal(_Sink):
    def __init__(self, steps: int | None) -> None:
        self._columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        self._console = Console(stderr=True)
        self._bar = Bar(*self._columns, console=self._console, auto_refresh=False)
        self._steps = steps
        self._task: TaskID | None = None

    def tell(self, step: int, told: Mapping[str, float]) -> None:
        if self._task is None:  # not before: compiling has a display of its own
            self._bar.start()
            _live.append(self._bar)
            self._task = self._bar.add_task("", total=self._steps)
        elapsed = timedelta(seconds=int(self._bar.tasks[0].elapsed or 0))
        beside = f" {self._steps or step}/{self._steps or '?'} {elapsed}"
        room = self._console.width - len(beside)
        text = in_one_line(told, room)
        left = min(room - len(text) - 1, _WIDEST_BAR)
        first, *others = self._columns
        self._bar.columns = (first, BarColumn(left), *others) if left >= _NARROWEST_BAR else self._columns
        self._bar.update(self._task, completed=step, description=text, refresh=True)

    def close(self) -> None:
        if self._task is not None:
            self._bar.stop()
            _live.remove(self._bar)


_NARROWEST_BAR, _WIDEST_BAR = 8, 40


def in_one_line(told: Mapping[str, float], room: float = math.inf) -> str:
    """What is told of a step, to be read on a terminal.

    Args:
        told: see ``Progress``.
        room: columns that there are; what matters least is left out until the rest fits.
    """
    memory = show_bytes(told["memory_bytes"])
    parts = {
        "loss": f"loss {told['loss']:.4f}",
        "seconds": f"{show_s(told['step_s'])} a step",
    }
    if "tokens_per_s" in told:
        parts["tokens"] = f"{told['tokens_per_s']:,.4g} tokens/s"
    parts["memory"] = f"{memory} of {show_bytes(told['budget_bytes'])}" if "budget_bytes" in told else memory
    if "predicted_exposed_s" in told:
        parts["waits"] = f"waits {told['predicted_exposed_s'] / told['predicted_step_s']:.0%} of it (predicted)"
    if told.get("num_skipped_steps"):
        parts["skipped"] = f"{told['num_skipped_steps']:.0f} skipped"
    least = (("waits", ""), ("memory", memory), ("memory", ""), ("tokens", ""), ("skipped", ""), ("seconds", ""))
    for less, shorter in least:
        if len(", ".join(parts.values())) > room and less in parts:
            parts[less] = shorter
            parts = {name: text for name, text in parts.items() if text}
    return ", ".join(parts.values())
