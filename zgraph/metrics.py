"""What a step tells besides its loss: numbers computed from the model's output, reduced over micro-batches and ranks.

They are results of the graph like the loss, and travel as one vector for means, one for sums, and one for maxima, among
which a minimum is that of its opposite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zgraph.errors import CaptureError, OptionError
from zgraph.program import Input, Role

Function = Callable[..., Any]


@dataclass(frozen=True)
class Metric:
    """One number.

    Attributes:
        function: ``function(output, *args, **kwargs)`` of the model's output and arguments: a tensor of one element.
        reduction: over micro-batches and ranks; a mean is weighted as the loss is.
    """

    function: Function
    reduction: str


@dataclass(frozen=True)
class Reduced:
    """All metrics of one reduction, in a vector.

    Attributes:
        reductions: of metrics whose values are in it: ``"mean"``, ``"sum"``, or ``"max"`` and ``"min"``.
        result: what the step returns.
        earlier: what earlier micro-batches have added up.
    """

    reductions: tuple[str, ...]
    result: Input
    earlier: Input

    @property
    def is_mean(self) -> bool:
        """Whether values are weighted as the loss is."""
        return self is MEANS


def _reduced(name: str, *reductions: str) -> Reduced:
    return Reduced(
        reductions, Input(Role.RECIPE, f"{name} of metrics"), Input(Role.RECIPE, f"earlier {name} of metrics")
    )


MEANS, SUMS, MAXIMA = _reduced("means", "mean"), _reduced("sums", "sum"), _reduced("maxima", "max", "min")
ALL = (MEANS, SUMS, MAXIMA)
_REDUCTIONS = tuple(reduction for reduced in ALL for reduction in reduced.reductions)


def check_metrics(metrics: Any) -> dict[str, Metric]:
    """Metrics by name, from what the user gives: functions, or pairs of a function and how it is reduced.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(metrics, Mapping):
        raise OptionError(f"metrics is a {type(metrics).__name__}", fix="give a dictionary of functions by name")
    found = {}
    for name, given in metrics.items():
        function, reduction = given if isinstance(given, tuple) and len(given) == 2 else (given, "mean")
        if not isinstance(name, str) or not callable(function) or reduction not in _REDUCTIONS:
            raise OptionError(
                f"metrics[{name!r}] is {given!r}",
                fix=f"give a function(output, *args, **kwargs), or a pair of one and one of {_REDUCTIONS}",
            )
        found[name] = Metric(function, reduction)
    return found


def evaluate(
    metrics: Mapping[str, Metric], output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: torch.Tensor
) -> list[tuple[Reduced, torch.Tensor]]:
    """The metrics of a micro-batch, as float64 vectors by reduction; those that there are.

    Args:
        like: a tensor on their device.

    Raises:
        CaptureError: one is not one number.
    """
    vectors = []
    for reduced in ALL:
        values = [
            _number(name, metric.function(output, *args, **kwargs), like) * _sign(metric)
            for name, metric in metrics.items()
            if metric.reduction in reduced.reductions
        ]
        if values:
            vectors.append((reduced, torch.stack(values)))
    return vectors


def _number(name: str, value: Any, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, (bool, int, float)):
        return torch.full((), value, dtype=torch.float64, device=like.device)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise CaptureError(f"the metric {name!r} is {what}, not one real number", fix="return one number")
    return value.detach().reshape(()).to(like.device, torch.float64)


def _sign(metric: Metric) -> int:
    return -1 if metric.reduction == "min" else 1


def by_name(metrics: Mapping[str, Metric], recipe: Mapping[str, Any], world: int) -> dict[str, torch.Tensor]:
    """Each metric as a 0-dim float64 tensor.

    Args:
        recipe: what the step has returned: sums as means over the ranks.
        world: how many ranks there are.
    """
    found: dict[str, torch.Tensor] = {}
    for reduced in ALL:
        names = [name for name, metric in metrics.items() if metric.reduction in reduced.reductions]
        if names:
            vector = recipe[reduced.result.name]
            found.update(zip(names, (vector * world if reduced is SUMS else vector).unbind(), strict=True))
    return {name: found[name] * _sign(metrics[name]) for name in metrics}
