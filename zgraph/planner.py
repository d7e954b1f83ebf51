"""``zgraph.plan``: the fastest options with which a training step fits, before anything runs.

The step is captured and rewritten as ``zgraph.compile`` does it, for as many ranks as are asked about, and played on a
machine that need not be there. Options that are left open are searched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from zgraph.batches import call_of
from zgraph.captures import Captures
from zgraph.compiler import check_arguments
from zgraph.config import parse_bytes
from zgraph.decision import MOST_RANKS, config_of, decide, fixed_options
from zgraph.errors import OptimizerError, OptionError
from zgraph.hardware import Hardware
from zgraph.metrics import check_metrics
from zgraph.plans import Plan, default_budget
from zgraph.report import Recorder, Report, make_report
from zgraph.search import Search
from zgraph.which_hardware import find_hardware


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
    report: str | Path | None = None,
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
        report: where to write a page that shows the planned step from inside, such as ``"report.html"``; see
            ``CompiledModule.report``. For it, the passes run once more, and each of them is proved.
        options: those of ``zgraph.compile``. Those that ``zgraph.choices`` lists are searched if they are ``"auto"`` or
            not given, but for ``offload``, which has to be ``"auto"``; what is inexact is never chosen unasked.

    Raises:
        OptionError: an option that does not exist or is out of range; a machine that is not known.
        StateError: the report cannot be written.
        ZgraphError: what ``zgraph.compile`` and its first step would raise.
    """
    search, budget = open_search(
        model,
        optimizer,
        batch=batch,
        world_size=world_size,
        hardware=hardware,
        memory=memory,
        loss=loss,
        weight=weight,
        metrics=metrics,
        **options,
    )
    made = decide(search, budget)
    if report is not None:
        report_of(search, made).write(report)
    return made


def report_of(search: Search, plan: Plan) -> Report:
    """See inside the step of a plan that a search has found."""
    recorder = Recorder(search.hardware)
    lowered = search.watched(plan.config, recorder)
    return make_report(recorder, lowered, plan, plan.config, search.hardware, proved=True)


def open_search(
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
    tell: Callable[[Search], None] = lambda _: None,
    **options: Any,
) -> tuple[Search, int]:
    """Among what is chosen, and how many bytes a rank may take; see ``plan`` and ``Search`` for arguments."""
    given: Any = world_size
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MOST_RANKS:
        raise OptionError(f"world_size={world_size!r} is not a number of ranks", fix=f"give 1 to {MOST_RANKS}")
    machine = find_hardware(hardware)
    if machine.device_type == "cpu":
        machine = machine.for_ranks(world_size)
    budget = parse_bytes(memory, "memory") if memory is not None else default_budget(machine)
    fixed = fixed_options(options)
    config = config_of(fixed)
    config.mesh(world_size)  # or refuse
    built, optimizer = _built(model, optimizer)
    check_arguments(built, optimizer, loss, weight, (), config)
    captures = Captures(built, optimizer, call_of(batch, "batch"), loss, weight, check_metrics(metrics))
    return Search(captures, machine, world_size, fixed, tell=tell), budget


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
