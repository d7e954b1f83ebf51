"""``zgraph.plan``: the fastest options with which a training step fits, before anything runs.

The step is captured and rewritten as ``zgraph.compile`` does it, for as many ranks as are asked about, and played on a
machine that need not be there. Options that are left open are searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.batches import Call, call_of, common_rows, micro_batches
from zgraph.blocks import Short, find_blocks, shorten
from zgraph.capture import capture
from zgraph.compiler import check_arguments
from zgraph.config import Config, parse_bytes
from zgraph.errors import CaptureError, OptimizerError, OptionError
from zgraph.hardware import Hardware
from zgraph.lower import Lowered, lower
from zgraph.machines import PRESETS, preset
from zgraph.metrics import Metric, check_metrics
from zgraph.plans import Estimate, Plan, Rejected, WayOut, default_budget, describe, show_bytes
from zgraph.predict import Prediction, predict
from zgraph.program import Mesh, Program
from zgraph.repetition import KEPT, repeat_blocks
from zgraph.which_hardware import find_hardware

AUTO = "auto"

_SEARCHED: dict[str, tuple[Any, ...]] = {
    "zero": (0, 1, 2, 3),
    "recompute": (None, "operators", "blocks"),
}
_TUNED: dict[str, tuple[Any, ...]] = {
    "bucket_bytes": tuple(mebi * 2**20 for mebi in (4, 16, 64, 256)),
    "in_flight": (0, 4, None),
}
_SIZES = (KEPT, KEPT + 2)
"""Numbers of blocks that stand for a model with more of them."""

_NUM_REJECTED = 5
_NUM_WAYS_OUT = 3
_MOST_RANKS = 2**16


def plan(
    model: nn.Module | Callable[[], nn.Module],
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer],
    *,
    batch: Any,
    world_size: int,
    hardware: str | Hardware = "cpu",
    memory: int | str | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    weight: Callable[..., torch.Tensor | float] | None = None,
    metrics: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Plan:
    """Choose options for a training step, and say what it will take.

    Neither a process group nor a device is needed, and nothing is allocated but the batch: the model is traced on fake
    tensors.

    Args:
        model: a module, which stays as it is, or a callable that builds one, called where parameters are on ``meta``.
        optimizer: one that holds the module's parameters, or a callable that makes one from parameters, such as
            ``torch.optim.AdamW``.
        batch: what one rank's model is called with in a step, all its micro-batches together: a tuple or list of
            positional arguments, a dictionary of keyword arguments, or a pair of such a tuple and dictionary. Tensors
            may be on ``meta``.
        world_size: how many ranks.
        hardware: a machine's name, a saved calibration, or a ``zgraph.hardware.Hardware``.
        memory: what one rank may take: bytes, or a string such as ``"80GiB"``; by default what the device has, less
            6 % for what the allocator does not count.
        loss, weight, metrics: as for ``zgraph.compile``.
        options: those of ``zgraph.compile``. ``zero``, ``bucket_bytes``, ``in_flight``, ``accumulate`` and
            ``recompute`` are searched if they are ``"auto"`` or not given; what is inexact is never chosen unasked.

    Raises:
        OptionError: an option that does not exist or is out of range; a machine that is not known.
        ZgraphError: what ``zgraph.compile`` and its first step would raise.
    """
    given: Any = world_size
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= _MOST_RANKS:
        raise OptionError(f"world_size={world_size!r} is not a number of ranks", fix=f"give 1 to {_MOST_RANKS}")
    machine = find_hardware(hardware)
    if machine.device_type == "cpu":
        machine = machine.for_ranks(world_size)
    budget = parse_bytes(memory, "memory") if memory is not None else default_budget(machine)
    fixed = {name: value for name, value in options.items() if value != AUTO}
    for name, value in options.items():
        if value == AUTO and name not in (*_SEARCHED, *_TUNED, "accumulate", "prefetch"):
            raise OptionError(f"{name}='auto' is not searched", fix="give a value, or leave it out")
    config = Config.from_options(fixed)
    fixed = {name: getattr(config, name) for name in fixed}
    built, optimizer = _built(model, optimizer)
    check_arguments(built, optimizer, loss, weight, (), config)
    step = _Step(built, optimizer, call_of(batch, "batch"), loss, weight, check_metrics(metrics))
    return _Search(step, machine, world_size, budget, fixed).plan()


def _built(model: nn.Module | Callable[[], nn.Module], optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise OptionError(f"model is a {type(model).__name__}", fix="pass a torch.nn.Module, or what builds one")
        with torch.device("meta"):
            model = model()
        if not isinstance(model, nn.Module):
            raise OptionError(f"model() gives a {type(model).__name__}", fix="give what builds a torch.nn.Module")
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise OptimizerError(
                f"optimizer is a {type(optimizer).__name__}", fix="pass an optimizer, or torch.optim.AdamW"
            )
        optimizer = optimizer(model.parameters())
    return model, optimizer


class _Step:
    """A training step, captured as often as micro-batches differ in shape.

    A model that repeats blocks is captured with few of them, and the program of the whole is written out from that
    (``zgraph.blocks``).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        call: Call,
        loss: Callable[..., torch.Tensor] | None,
        weight: Callable[..., torch.Tensor | float] | None,
        metrics: dict[str, Metric],
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.call: Call = pytree.tree_map_only(torch.Tensor, _on_cpu, call)
        self._functions: dict[str, Any] = {"loss": loss, "weight": weight, "metrics": metrics}
        self._captured: dict[tuple[Config, int], Program] = {}
        self.notes: list[str] = []
        self._short: tuple[Short, torch.optim.Optimizer] | None = None
        path, self.num_blocks = max(find_blocks(model), key=lambda found: found[1], default=("", 1))
        if self.num_blocks > _SIZES[-1]:
            try:
                short = shorten(model, path)
                self._short = short, short.optimizer(optimizer, model)
            except CaptureError as error:
                self._capture_whole(error)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of blocks from which the whole model's estimate is extended; its own number if it is not."""
        return _SIZES if self._short is not None else (self.num_blocks,)

    @property
    def num_rows(self) -> int:
        """What accumulation can divide."""
        return common_rows(leaf for leaf in pytree.tree_leaves(self.call) if isinstance(leaf, torch.Tensor))

    def captured(self, config: Config, num_blocks: int) -> Program:
        """The step on the last micro-batch, of the model with so many blocks.

        What only passes read of the options makes no difference.
        """
        read = replace(config, **{name: getattr(_DEFAULTS, name) for name in _ONLY_PASSES_READ})
        key = (read, num_blocks)
        if key not in self._captured:
            self._captured[key] = self._capture(read, num_blocks)
        return self._captured[key]

    def _capture(self, config: Config, num_blocks: int) -> Program:
        call = micro_batches(*self.call, config.accumulate)[-1]

        def captured(model: nn.Module, optimizer: torch.optim.Optimizer) -> Program:
            return capture(model, optimizer, *call, config=config, device=torch.device("cpu"), **self._functions)

        if self._short is None:
            return captured(self.model, self.optimizer)
        short, optimizer = self._short
        if num_blocks == len(short.kept):
            return captured(short.model, optimizer)
        return repeat_blocks(self.captured(config, len(short.kept)), short.path, num_blocks)

    def _capture_whole(self, error: CaptureError) -> None:
        """From now on, as the blocks are not alike."""
        self._short = None
        self._captured.clear()
        self.notes.append(f"all {self.num_blocks} blocks were captured: {error.what}")

    def check_blocks(self, config: Config) -> None:
        """Capture the whole model if what few of its blocks compute cannot be repeated."""
        if self._short is not None:
            try:
                self.captured(config, _SIZES[-1])
            except CaptureError as error:
                self._capture_whole(error)


_DEFAULTS = Config()
_ONLY_PASSES_READ = ("zero", "bucket_bytes", "prefetch", "in_flight", "recompute", "keep_gathered", "unshard")


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "meta" else tensor


@dataclass(frozen=True)
class _Tried:
    """A choice of options and what it is predicted to take.

    Attributes:
        options: those that were chosen, and those that the user fixed.
        estimate: of the whole model, extended from few blocks where it repeats some.
        is_exact: whether it is of the whole model's program instead.
    """

    options: dict[str, Any]
    estimate: Estimate
    is_exact: bool


class _Search:
    """Looks for the fastest choice within a budget."""

    def __init__(self, step: _Step, hardware: Hardware, world: int, budget: int, fixed: dict[str, Any]) -> None:
        self.step, self.hardware, self.world, self.budget, self.fixed = step, hardware, world, budget, fixed
        self._tried: dict[tuple[Any, ...], _Tried] = {}
        self._last: tuple[tuple[Any, ...], tuple[Lowered, Prediction]] | None = None
        self._notes: list[str] = []

    def plan(self) -> Plan:
        """Try choices, then work out the best one in full."""
        self.step.check_blocks(Config.from_options(self.fixed))
        while (uncertain := self._most_promising()) is not None:
            self._work_out(uncertain)
        fitting = [tried for tried in self._tried.values() if self._may_fit(tried)]
        if fitting:
            return self._told(min(fitting, key=_speed), ())
        least = min(self._tried.values(), key=lambda tried: tried.estimate.peak_bytes)
        self._work_out(least)
        least = self._tried[_key(least.options)]
        return self._told(least, self._ways_out(least))

    def _most_promising(self) -> _Tried | None:
        """Of what is only estimated and may fit, the fastest, if that may be faster than all that is known to fit."""
        self._try_all()
        fitting = [tried for tried in self._tried.values() if self._may_fit(tried)]
        if fitting:
            self._tune(min(fitting, key=_speed))
            best = min((tried for tried in self._tried.values() if self._may_fit(tried)), key=_speed)
            return None if best.is_exact else best
        return None

    def _work_out(self, tried: _Tried) -> None:
        """Replace an estimate by what the whole model's program gives."""
        made = self._in_full(tried.options)[1]
        self._tried[_key(tried.options)] = _Tried(tried.options, Estimate.of(tried.options, made), is_exact=True)

    def _in_full(self, options: dict[str, Any]) -> tuple[Lowered, Prediction]:
        """Of the whole model; that of the last options is kept, as they are mostly those that are chosen."""
        if self._last is None or self._last[0] != _key(options):
            self._last = None  # its programs may be large
            self._last = _key(options), self._predict(options, self.step.num_blocks)
        return self._last[1]

    # -- trying -----------------------------------------------------------------------------------------------

    def try_(self, **options: Any) -> _Tried:
        """What these options take, on top of those that the user fixed."""
        merged = {name: value for name, value in options.items() if name == "zero" or value != getattr(_DEFAULTS, name)}
        merged.update(self.fixed)
        key = _key(merged)
        if key not in self._tried:
            self._tried[key] = _Tried(merged, self._estimate(merged), is_exact=len(self.step.sizes) == 1)
        return self._tried[key]

    def _estimate(self, options: dict[str, Any]) -> Estimate:
        """Of the whole model; where it repeats blocks, from two numbers of them in a line."""
        sizes = self.step.sizes
        made = [Estimate.of(options, self._predict(options, size)[1]) for size in sizes]
        if len(made) == 1:
            return made[0]
        (few, more), beyond = made, (self.step.num_blocks - sizes[0]) / (sizes[1] - sizes[0])

        def extended(name: str) -> float:
            before, after = float(getattr(few, name)), float(getattr(more, name))
            return before + beyond * (after - before)

        live = round(extended("peak_bytes"))
        reserved = round(live * more.reserved_bytes / more.peak_bytes)
        return Estimate(options, extended("step_s"), extended("exposed_s"), live, reserved)

    def _predict(self, options: dict[str, Any], num_blocks: int) -> tuple[Lowered, Prediction]:
        config = Config.from_options(options)
        captured = self.step.captured(config, num_blocks)
        lowered = lower(captured, config, Mesh(self.world), None, (), hardware=self.hardware, prove=False)
        return lowered, predict(lowered, self.hardware, config.accumulate)

    def _may_fit(self, tried: _Tried) -> bool:
        """Whether it fits; of an estimate, whether what is live fits: bytes that are reserved do not grow in a line."""
        estimate = tried.estimate
        return (estimate.reserved_bytes if tried.is_exact else estimate.peak_bytes) <= self.budget

    def _try_all(self) -> None:
        """Stages, micro-batches and recomputation: of each stage, none that fits with less of both."""
        fitting: list[tuple[int, int, int]] = []
        stages = self._values("zero", _SEARCHED["zero"] if self.world > 1 else (0,))
        for i, accumulate in enumerate(self._values("accumulate", _divisors(self.step.num_rows))):
            for j, recompute in enumerate(self._values("recompute", _SEARCHED["recompute"])):
                for zero in stages:
                    if any(a <= i and r <= j and stage == zero for a, r, stage in fitting):
                        continue
                    tried = self._attempt(accumulate=accumulate, recompute=recompute, zero=zero)
                    if tried is not None and self._may_fit(tried):
                        fitting.append((i, j, zero))

    def _attempt(self, **options: Any) -> _Tried | None:
        """None if the model has no blocks to recompute, where that was not asked for."""
        try:
            return self.try_(**options)
        except OptionError as error:
            if options["recompute"] is None or "recompute" in self.fixed:
                raise
            self._note(f"recompute={options['recompute']!r} was not considered: {error.what}")
            return None

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _values(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        return (self.fixed[name],) if name in self.fixed else values

    def _tune(self, best: _Tried) -> None:
        """The best choice with other bucket sizes, then with fewer or more of them in flight."""
        for name, values in _TUNED.items():
            is_scheduled = "prefetch" not in self.fixed
            if self.world > 1 and name not in self.fixed and (is_scheduled or name != "in_flight"):
                others = [self.try_(**{**best.options, name: value}) for value in values]
                best = min((tried for tried in (best, *others) if self._may_fit(tried)), key=_speed)

    # -- ways out ---------------------------------------------------------------------------------------------

    def _ways_out(self, least: _Tried) -> tuple[WayOut, ...]:
        """Changes that make the choice which takes least memory fit, those that cost least first."""
        before = least.estimate.step_s
        found: list[WayOut] = []
        if least.estimate.reserved_bytes <= (most := default_budget(self.hardware)):
            needed = f"{math.ceil(least.estimate.reserved_bytes / 2**20)}MiB"
            words = f"memory={needed!r}, of {show_bytes(most)} that there is"
            found.append(WayOut(words, before, least.estimate.reserved_bytes, 1.0))
        for change, hardware, world, options in self._changes(least):
            if world > self.world and any(way.change.startswith("world_size") for way in found):
                continue  # fewer ranks are enough
            budget = self.budget if hardware is self.hardware else default_budget(hardware)
            tried = _Search(self.step, hardware, world, budget, {**self.fixed, **options}).try_(**least.options)
            made = tried.estimate
            if made.reserved_bytes <= budget:
                found.append(WayOut(change, made.step_s, made.reserved_bytes, made.step_s / before))
        return tuple(sorted(found, key=lambda way: way.cost)[:_NUM_WAYS_OUT])

    def _changes(self, least: _Tried) -> Iterator[tuple[str, Hardware, int, dict[str, Any]]]:
        """What may be asked of the user: words, machine, ranks, options.

        Every rank keeps its batch, so what an example costs in device-seconds is as the seconds of a step. Ranks are
        doubled until the step fits; of larger machines, the smallest is named on which it does.
        """
        config = Config.from_options(least.options)
        lower_precision: dict[str, Any] = {}
        for name, value in (("precision", "bf16"), ("state_precision", "int8")):
            if getattr(config, name) is None:
                lower_precision[name] = value
                yield f"{name}={value!r}", self.hardware, self.world, {name: value}
        if len(lower_precision) > 1:
            words = ", ".join(f"{name}={value!r}" for name, value in lower_precision.items())
            yield words, self.hardware, self.world, lower_precision
        for doublings in range(1, 7):
            world = self.world << doublings
            if world <= _MOST_RANKS and self.hardware.device_type != "cpu":
                sharded: dict[str, Any] = {} if "zero" in self.fixed else {"zero": 3}
                words = ", ".join([f"world_size={world}", *(f"{name}={value}" for name, value in sharded.items())])
                yield words, self.hardware, world, sharded
        for machine in _larger(self.hardware) if self.budget >= default_budget(self.hardware) else ():
            if default_budget(machine) >= least.estimate.reserved_bytes:
                yield f"hardware={machine.name!r}", machine, self.world, {}
                return

    # -- telling ----------------------------------------------------------------------------------------------

    def _told(self, best: _Tried, ways_out: tuple[WayOut, ...]) -> Plan:
        lowered, prediction = self._in_full(best.options)
        return describe(
            self.step.model,
            lowered,
            prediction,
            best.options,
            self.hardware,
            self.budget,
            rejected=tuple(Rejected(tried.estimate, self._why(tried, best)) for tried in self._runners_up(best)),
            ways_out=ways_out,
            notes=(*self.step.notes, *self._notes),
        )

    def _runners_up(self, best: _Tried) -> list[_Tried]:
        """The best other choice of each stage, number of micro-batches and recomputation: those that fit come first."""
        found: dict[Any, _Tried] = {}
        for tried in sorted(self._tried.values(), key=lambda tried: (not self._may_fit(tried), _speed(tried))):
            config = Config.from_options(tried.options)
            if tried is not best:
                found.setdefault((config.zero, config.accumulate, config.recompute), tried)
        return list(found.values())[:_NUM_REJECTED]

    def _why(self, tried: _Tried, best: _Tried) -> str:
        if not self._may_fit(tried):
            return f"{show_bytes(tried.estimate.reserved_bytes - self.budget)} too much"
        slower = tried.estimate.step_s / best.estimate.step_s - 1
        return f"{slower:.1%} slower" if slower > 5e-4 else "no faster"


def _key(options: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((name, repr(value)) for name, value in options.items()))


def _speed(tried: _Tried) -> tuple[float, int]:
    """Fast first; of equally fast ones, the one that takes less memory."""
    return tried.estimate.step_s, tried.estimate.reserved_bytes


def _divisors(number: int) -> tuple[int, ...]:
    """Numbers that divide ``number``, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return tuple(dict.fromkeys([*small, *(number // n for n in reversed(small))]))


def _larger(hardware: Hardware) -> list[Hardware]:
    """Presets whose devices have more memory, those with least of it first."""
    if hardware.device_type == "cpu":
        return []
    found = [machine for machine in map(preset, PRESETS) if machine.memory_bytes > hardware.memory_bytes]
    return sorted(found, key=lambda machine: machine.memory_bytes)
