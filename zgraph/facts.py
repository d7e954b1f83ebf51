"""What a captured step is specialised on, in words; when any of it changes, the step is captured again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.errors import CaptureError
from zgraph.optimizer_state import Forms
from zgraph.program import Guard, Input
from zgraph.update import StateEntry, StateSpec, structure

STEP_COUNTS = "the optimizer's step counts"
"""The one fact that ranks must agree on although a captured step does not depend on it."""


def facts_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Forms, leaves: list[Any], spec: pytree.TreeSpec
) -> dict[str, str]:
    """Everything a captured step is specialised on, by name.

    Args:
        model, optimizer: the user's.
        state: the optimizer state that exists.
        leaves, spec: the flattened arguments of the step.
    """
    params = list(model.named_parameters())
    names = {id(p): name for name, p in params}
    batch = [fact_of(leaf) for leaf in leaves]
    members = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    modes = [
        f"{device}: {torch.get_autocast_dtype(device)}"
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    # Step counts themselves change every step; which parameters share one is what buckets depend on.
    counts: dict[Any, int] = {}
    states = []
    for name, forms in state.items():
        numbers = tuple((key, form.value) for key, form in forms.items() if form.value is not None)
        kinds = [(key, form.elementwise, str(form.dtype)) for key, form in forms.items()]
        states.append((name, kinds, counts.setdefault(numbers, len(counts))))
    return {
        "the arguments' structure": str(spec),
        "the arguments' shapes and values": repr(batch),
        "the model's parameters": repr([(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in params]),
        "the model's buffers": repr([(n, tuple(b.shape), str(b.dtype)) for n, b in model.named_buffers()]),
        "training mode": "".join("t" if m.training else "e" for m in model.modules()),
        "the optimizer": repr((structure(optimizer), members)),
        "the optimizer's state": repr(states),
        STEP_COUNTS: repr(list(counts)),
        "autocast and defaults": repr((modes, torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())),
    }


def key_of(facts: dict[str, str]) -> str:
    """Equal where one captured step serves, as far as its guards hold."""
    return repr({name: fact for name, fact in facts.items() if name != STEP_COUNTS})


def fact_of(leaf: Any) -> str:
    """What a captured step depends on of one leaf of its arguments.

    Raises:
        CaptureError: the leaf is an object whose content would silently become a constant of the graph.
    """
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype} {tuple(leaf.shape)} {tuple(leaf.stride())} {leaf.device.type}"
    if leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return repr(leaf)
    raise CaptureError(
        f"an argument of train_step holds a {type(leaf).__name__}, which would become a constant of the graph",
        fix="pass tensors (torch.from_numpy for arrays), numbers and strings, in lists, tuples and dictionaries",
    )


def state_spec(model: nn.Module, state: Forms) -> StateSpec:
    """Optimizer state that exists now, for capture."""
    params = dict(model.named_parameters())
    spec: StateSpec = {}
    for name, forms in state.items():
        entries = {
            key: StateEntry(tuple(params[name].shape) if form.elementwise else (), form.dtype, form.value)
            for key, form in forms.items()
        }
        if entries:
            spec[name] = entries
    return spec


def hold(guards: tuple[Guard, ...], values: dict[Input, float]) -> bool:
    """Whether what was decided while capturing would be decided alike now.

    Args:
        guards: of the program.
        values: hyperparameters, and optimizer state that is a number.
    """
    return all(
        all(what in values for what in guard.inputs) and guard.holds(*(values[what] for what in guard.inputs))
        for guard in guards
    )
