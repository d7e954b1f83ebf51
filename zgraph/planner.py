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

from zgraph.batches import Call, call_of, micro_batches
from zgraph.capture import capture
from zgraph.compiler import check_arguments
from zgraph.config import Config, parse_bytes
from zgraph.errors import OptimizerError, OptionError
from zgraph.expected_error import expected_error
from zgraph.footprint import Holding
from zgraph.hardware import Hardware, find_hardware
from zgraph.lower import lower
from zgraph.machines import PRESETS, preset
from zgraph.metrics import Metric, check_metrics
from zgraph.plans import Estimate, Owner, Plan, Rejected, WayOut, show_bytes
from zgraph.predict import Prediction, predict
from zgraph.program import Mesh, Program

AUTO = "auto"

MARGIN = 0.06
"""Part of a device's memory that a default budget leaves alone: for the context of the driver, for libraries and
communication buffers, none of which the allocator counts."""

_SEARCHED: dict[str, tuple[Any, ...]] = {
    "zero": (0, 1, 2, 3),
    "recompute": (None, "operators", "blocks"),
}
_TUNED: dict[str, tuple[Any, ...]] = {
    "bucket_bytes": tuple(mebi * 2**20 for mebi in (4, 16, 64, 256)),
    "prefetch": (1, 2),
}
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
        options: those of ``zgraph.compile``. ``zero``, ``bucket_bytes``, ``prefetch``, ``accumulate`` and ``recompute``
            are searched if they are ``"auto"`` or not given; what is inexact is never chosen unasked.

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
        if value == AUTO and name not in (*_SEARCHED, *_TUNED, "accumulate"):
            raise OptionError(f"{name}='auto' is not searched", fix="give a value, or leave it out")
    built, optimizer = _built(model, optimizer)
    check_arguments(built, optimizer, loss, weight, (), Config.from_options(fixed))
    step = _Step(built, optimizer, call_of(batch, "batch"), loss, weight, check_metrics(metrics))
    return _Search(step, machine, world_size, budget, fixed).plan()


def default_budget(hardware: Hardware) -> int:
    """Bytes that one rank may take if nobody says."""
    return int(hardware.memory_bytes * (1 - MARGIN))


def _built(model: nn.Module | Callable[[], nn.Module], optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise OptionError(f"model is a {type(model).__name__}", fix="pass a torch.nn.Module, or what builds one")
        with torch.device("meta"):
            model = model()
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise OptimizerError(
                f"optimizer is a {type(optimizer).__name__}", fix="pass an optimizer, or torch.optim.AdamW"
            )
        optimizer = optimizer(model.parameters())
    return model, optimizer


class _Step:
    """A training step, captured as often as micro-batches differ in shape."""

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
        self._captured: dict[Config, Program] = {}

    @property
    def num_rows(self) -> int:
        """The first dimension that all tensors of the batch have; 1 if they have none in common."""
        leaves = [leaf for leaf in pytree.tree_leaves(self.call) if isinstance(leaf, torch.Tensor)]
        lengths = {leaf.shape[0] if leaf.dim() else None for leaf in leaves}
        return (lengths.pop() or 1) if len(lengths) == 1 else 1

    @property
    def num_tokens(self) -> int:
        """Elements of the largest integer tensor with two dimensions or more."""
        leaves = [leaf for leaf in pytree.tree_leaves(self.call) if isinstance(leaf, torch.Tensor)]
        return max((leaf.numel() for leaf in leaves if leaf.dim() > 1 and not leaf.dtype.is_floating_point), default=0)

    def captured(self, config: Config) -> Program:
        """The step on the last micro-batch; what only passes read of the options makes no difference."""
        read = replace(config, **{name: getattr(_DEFAULTS, name) for name in _ONLY_PASSES_READ})
        if read not in self._captured:
            call = micro_batches(*self.call, config.accumulate)[-1]
            self._captured[read] = capture(
                self.model, self.optimizer, *call, config=read, device=torch.device("cpu"), **self._functions
            )
        return self._captured[read]


_DEFAULTS = Config()
_ONLY_PASSES_READ = ("zero", "bucket_bytes", "prefetch", "recompute", "keep_gathered")


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "meta" else tensor


@dataclass(frozen=True)
class _Tried:
    """A choice of options and what it is predicted to take."""

    options: dict[str, Any]
    prediction: Prediction

    @property
    def estimate(self) -> Estimate:
        made = self.prediction
        return Estimate(self.options, made.step_s, made.exposed_s, made.peak_bytes, made.reserved_bytes)


class _Search:
    """Looks for the fastest choice within a budget."""

    def __init__(self, step: _Step, hardware: Hardware, world: int, budget: int, fixed: dict[str, Any]) -> None:
        self.step, self.hardware, self.world, self.budget, self.fixed = step, hardware, world, budget, fixed
        self._tried: dict[tuple[Any, ...], _Tried] = {}
        self._notes: list[str] = []

    def plan(self) -> Plan:
        """Try choices, best first where it is known, and tell."""
        candidates = self._candidates()
        fitting = [tried for tried in candidates if self._fits(tried)]
        if fitting:
            best = min(fitting, key=lambda tried: tried.prediction.step_s)
            best = self._tuned(best)
        else:
            best = min(candidates, key=lambda tried: tried.prediction.reserved_bytes)
        return self._told(best, self._ways_out(best) if not fitting else ())

    # -- trying -----------------------------------------------------------------------------------------------

    def try_(self, **options: Any) -> _Tried:
        """What these options take, on top of those that the user fixed."""
        merged = {**options, **self.fixed}
        key = (self.world, *sorted((name, repr(value)) for name, value in merged.items()))
        if key not in self._tried:
            config = Config.from_options(merged)
            lowered = lower(self.step.captured(config), config, Mesh(self.world), None, ())
            self._tried[key] = _Tried(merged, predict(lowered, self.hardware, config.accumulate))
        return self._tried[key]

    def _fits(self, tried: _Tried) -> bool:
        return tried.prediction.reserved_bytes <= self.budget

    def _candidates(self) -> list[_Tried]:
        """Choices of stage, micro-batches and recomputation; none of which a cheaper one that fits makes pointless."""
        tried: list[_Tried] = []
        fitting: list[tuple[int, int, int]] = []
        for i, accumulate in enumerate(self._values("accumulate", _divisors(self.step.num_rows))):
            for j, recompute in enumerate(self._values("recompute", _SEARCHED["recompute"])):
                for k, zero in enumerate(self._stages()):
                    if any(a <= i and r <= j and z <= k and (a, r, z) != (i, j, k) for a, r, z in fitting):
                        continue
                    one = self._attempt(accumulate=accumulate, recompute=recompute, zero=zero)
                    if one is None:
                        break
                    tried.append(one)
                    if self._fits(one):
                        fitting.append((i, j, k))
        return tried

    def _attempt(self, **options: Any) -> _Tried | None:
        """None if the model has no blocks to recompute, where that was not asked for."""
        try:
            return self.try_(**{name: value for name, value in options.items() if value is not None})
        except OptionError as error:
            if options.get("recompute") is None or "recompute" in self.fixed:
                raise
            self._note(f"recompute={options['recompute']!r} was not considered: {error.what}")
            return None

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _values(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        return (self.fixed[name],) if name in self.fixed else values

    def _stages(self) -> Sequence[int]:
        return self._values("zero", _SEARCHED["zero"] if self.world > 1 else (0,))

    def _tuned(self, best: _Tried) -> _Tried:
        """The best choice with other bucket sizes and prefetching, one after the other."""
        for name, values in _TUNED.items():
            if self.world > 1 and name not in self.fixed:
                others = [self.try_(**{**best.options, name: value}) for value in values]
                fitting = [tried for tried in (best, *others) if self._fits(tried)]
                best = min(fitting, key=lambda tried: tried.prediction.step_s)
        return best

    # -- ways out ---------------------------------------------------------------------------------------------

    def _ways_out(self, best: _Tried) -> tuple[WayOut, ...]:
        """Changes that make the best choice fit, those that cost least first."""
        before = best.prediction.step_s
        found = []
        for change, hardware, world, options in self._changes(best):
            budget = self.budget if hardware is self.hardware else default_budget(hardware)
            tried = _Search(self.step, hardware, world, budget, {**self.fixed, **options}).try_(**best.options)
            made = tried.prediction
            if made.reserved_bytes <= budget:
                found.append(WayOut(change, made.step_s, made.reserved_bytes, made.step_s / before))
        return tuple(sorted(found, key=lambda way: way.cost)[:_NUM_WAYS_OUT])

    def _changes(self, best: _Tried) -> Iterator[tuple[str, Hardware, int, dict[str, Any]]]:
        """What may be asked of the user: words, machine, ranks, options.

        Every rank keeps its batch, so what an example costs in device-seconds is as the seconds of a step. Ranks are
        doubled until the step fits; of larger machines, the smallest is named on which it does.
        """
        config = Config.from_options(best.options)
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
                yield f"world_size={world}", self.hardware, world, {"zero": 3}
        for machine in _larger(self.hardware):
            if default_budget(machine) >= best.prediction.reserved_bytes:
                yield f"hardware={machine.name!r}", machine, self.world, {}
                return

    # -- telling ----------------------------------------------------------------------------------------------

    def _told(self, best: _Tried, ways_out: tuple[WayOut, ...]) -> Plan:
        model = self.step.model
        made = best.prediction
        others = [tried for tried in self._tried.values() if tried is not best]
        others.sort(key=lambda tried: (not self._fits(tried), tried.prediction.step_s))
        return Plan(
            model=type(model).__name__,
            num_params=sum(p.numel() for p in model.parameters()),
            num_examples=self.step.num_rows,
            num_tokens=self.step.num_tokens,
            world_size=self.world,
            hardware=self.hardware.name,
            budget_bytes=self.budget,
            chosen=best.estimate,
            flops=made.flops,
            by_kind={kind.value: num_bytes for kind, num_bytes in made.peak_by_kind().most_common()},
            owners=_owners(made.peak.held_at(made.peak.peak_position)),
            rejected=tuple(Rejected(tried.estimate, self._why(tried, best)) for tried in others[:_NUM_REJECTED]),
            ways_out=ways_out,
            error=expected_error(self.hardware.device_type),
            unknown=dict(made.unknown),
            notes=tuple(self._notes),
        )

    def _why(self, tried: _Tried, best: _Tried) -> str:
        if not self._fits(tried):
            return f"{show_bytes(tried.prediction.reserved_bytes - self.budget)} too much"
        slower = tried.prediction.step_s / best.prediction.step_s - 1
        return f"{slower:.1%} slower" if slower > 0 else "as fast, and takes more memory"


def _owners(held: Sequence[Holding], num: int = 8) -> tuple[Owner, ...]:
    """What is held, alike tensors together, largest first."""
    alike: dict[tuple[str, str, str | None], list[int]] = {}
    for holding in held:
        alike.setdefault((holding.what, holding.kind.value, holding.source), []).append(holding.num_bytes)
    found = [Owner(what, kind, sum(sizes), len(sizes), source) for (what, kind, source), sizes in alike.items()]
    return tuple(sorted(found, key=lambda owner: -owner.num_bytes)[:num])


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
